"""The CIFAR ResNets of He et al. 2016 (arXiv 1512.03385, section 4.2), as TAKD uses them.

Shape suffixes: B batch, H W image; channels is written out.
"""

from collections import OrderedDict
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from kd.component import component


@component
class CifarResNet:
    """Stages of 16, 32 and 64 channels, (depth - 2) / 6 blocks each, then average pooling."""

    depth: Literal[8, 14, 20, 26, 32, 44, 56, 110]
    """Number of layers with weights, shortcuts not counted: 6n + 2."""

    kind: Literal["cifar_resnet"] = "cifar_resnet"

    def build(self, *, channels: int, image_size: int, num_classes: int) -> nn.Module:
        """Make the network, randomly initialised as in He et al. 2015 (fan out); any image size.

        At the start of stages 2 and 3, the shortcut is a strided 1 x 1 convolution (option B), as
        in TAKD's code; He et al.'s own CIFAR networks pad with zeros instead (option A).
        """
        del image_size  # average pooling takes any
        layers: list[nn.Module] = [
            _conv3x3(channels, 16, 1),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
        ]
        width = 16
        for stage_width in (16, 32, 64):
            for block in range((self.depth - 2) // 6):
                stride = 2 if block == 0 and stage_width > 16 else 1
                layers.append(BasicBlock(width, stage_width, stride))
                width = stage_width
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        network = nn.Sequential(
            OrderedDict(features=nn.Sequential(*layers), classifier=nn.Linear(width, num_classes))
        )
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        return network


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(channels_in, channels_out, stride)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = _conv3x3(channels_out, channels_out, 1)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False),
                nn.BatchNorm2d(channels_out),
            )

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, channels_in, H, W) to (B, channels_out, H / stride, W / stride), rounded up."""
        hidden = F.relu(self.bn1(self.conv1(inputs)))
        return F.relu(self.bn2(self.conv2(hidden)) + self.shortcut(inputs))


def _conv3x3(channels_in: int, channels_out: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
