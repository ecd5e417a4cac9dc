import pytest
import torch
from torch import nn

from kd.models import CifarResNet, build_model, count
from kd.models.cifar_resnet import BasicBlock

# Two 1 x 1 convolutions with their norms, which option A (zero padding) does without.
SHORTCUTS = (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)


@pytest.mark.parametrize(
    ("depth", "parameters"),
    # He et al. 2016, table 6, rounds these to 0.27, 0.46, 0.66, 0.85 and 1.7 million.
    [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018), (110, 1_727_962)],
)
def test_parameters_are_the_papers_and_the_shortcuts(depth: int, parameters: int) -> None:
    network = CifarResNet(depth=depth).build(channels=3, image_size=32, num_classes=10)
    assert sum(p.numel() for p in network.parameters()) == parameters + SHORTCUTS
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert len([m for m in convolutions if m.kernel_size == (3, 3)]) + 1 == depth


def test_multiply_adds_of_the_smallest_are_as_counted_by_hand() -> None:
    network = build_model(CifarResNet(depth=8), channels=3, image_size=32, num_classes=10)
    stem = 1024 * 9 * 3 * 16
    first = 2 * 1024 * 9 * 16 * 16
    second = 256 * (9 * 16 * 32 + 9 * 32 * 32 + 16 * 32)
    third = 64 * (9 * 32 * 64 + 9 * 64 * 64 + 32 * 64)
    assert count(network, (3, 32, 32)).multiply_adds == stem + first + second + third + 640


def test_a_block_is_relu_of_branch_plus_shortcut() -> None:
    torch.manual_seed(0)
    block = BasicBlock(4, 6, stride=2).eval()
    images = torch.randn(2, 4, 8, 8)
    branch = block.bn2(block.conv2(block.bn1(block.conv1(images)).clamp(min=0)))
    shortcut = block.shortcut[1](block.shortcut[0](images))
    assert torch.equal(block(images), (branch + shortcut).clamp(min=0))
    plain = BasicBlock(4, 4, stride=1).eval()
    nn.init.zeros_(plain.conv2.weight)
    assert torch.equal(plain(images), images.clamp(min=0))


def test_the_initial_spread_keeps_the_signal_of_backpropagation() -> None:
    torch.manual_seed(0)
    network = CifarResNet(depth=56).build(channels=3, image_size=32, num_classes=10)
    conv = network.features[-3].conv2  # 64 to 64: variance 2 / (9 * 64)
    assert conv.weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)
