"""The plain CNNs of TAKD: 3 x 3 convolutions with poolings between them, no shortcuts.

Mirzadeh et al., "Improved Knowledge Distillation via Teacher Assistant", AAAI 2020
(arXiv 1902.03393); the layers are those of the authors' published code.
"""

from collections import OrderedDict
from typing import Literal

from torch import nn

from kd.component import ConfigError, component, require

# A number is a convolution with that many channels, "M" a 2 x 2 max pooling.
_CIFAR10_CONVS: dict[int, tuple[int | str, ...]] = {
    2: (16, "M", 16, "M"),
    4: (16, 16, "M", 32, 32, "M"),
    6: (16, 16, "M", 32, 32, "M", 64, 64, "M"),
    8: (16, 16, "M", 32, 32, "M", 64, 64, "M", 128, 128, "M"),
    10: (32, 32, "M", 64, 64, "M", 128, 128, "M", 256, 256, 256, 256, "M"),
}
_CIFAR100_CONVS: dict[int, tuple[int | str, ...]] = {
    2: (32, "M", 32, "M"),
    4: (32, 32, "M", 64, 64, "M"),
    6: (32, 32, "M", 64, 64, "M", 128, 128),  # without a third pooling, as published
    8: (32, 32, "M", 64, 64, "M", 128, 128, "M", 256, 256, "M"),
    10: (32, 32, "M", 64, 64, "M", 128, 128, "M", 256, 256, 256, 256, "M"),
}
_CONVS = {"cifar10": _CIFAR10_CONVS, "cifar100": _CIFAR100_CONVS}
# Units of the hidden layer before the class layer, if there is one.
_HIDDEN = {"cifar10": {8: 64, 10: 128}, "cifar100": {8: 64, 10: 512}}


@component
class PlainCNN:
    """`depth` convolutions (3 x 3, batch norm, ReLU) with poolings between, then linear layers."""

    depth: Literal[2, 4, 6, 8, 10]
    """Number of convolutions."""

    kind: Literal["plain_cnn"] = "plain_cnn"
    table: Literal["cifar10", "cifar100"] = "cifar10"
    """Which of the paper's two tables gives the channels: the one for CIFAR-10 is narrower."""

    width: float = 1.0
    """Multiplies the table's channels and hidden units (rounded, at least 1)."""

    def __post_init__(self) -> None:
        require(self.width > 0, "width", self.width, "more than 0")

    def build(self, *, channels: int, image_size: int, num_classes: int) -> nn.Module:
        """Make the network, randomly initialised.

        The linear layers read the whole last feature map, flattened, as in the paper: they grow
        with the square of `image_size`.

        Raises:
            ConfigError: images of this size are too small for the poolings.
        """
        convs = _CONVS[self.table][self.depth]
        side = image_size // 2 ** convs.count("M")
        if side == 0:
            raise ConfigError(
                f"image_size is {image_size}; a plain_cnn of depth {self.depth} halves it "
                f"{convs.count('M')} times and needs {2 ** convs.count('M')} or more"
            )
        features: list[nn.Module] = []
        width = channels
        for layer in convs:
            if isinstance(layer, str):
                features.append(nn.MaxPool2d(2))
            else:
                features += _conv(width, self._scaled(layer))
                width = self._scaled(layer)
        features.append(nn.Flatten())
        classifier: list[nn.Module] = []
        width *= side**2
        if self.depth in _HIDDEN[self.table]:
            hidden = self._scaled(_HIDDEN[self.table][self.depth])
            classifier += [nn.Linear(width, hidden), nn.ReLU(inplace=True)]
            width = hidden
        classifier.append(nn.Linear(width, num_classes))
        return nn.Sequential(
            OrderedDict(features=nn.Sequential(*features), classifier=nn.Sequential(*classifier))
        )

    def _scaled(self, units: int) -> int:
        return max(1, round(units * self.width))


def _conv(channels_in: int, channels_out: int) -> list[nn.Module]:
    # No bias (the published code has one): the batch norm that follows would cancel it.
    conv = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
    return [conv, nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True)]
