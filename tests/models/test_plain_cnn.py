"""Against the layer lists of TAKD's published code, counted by hand and by a small counter."""

import pytest
import torch

from kd.component import ConfigError
from kd.models import PlainCNN, build_model, count

# Conv layers and hidden units as the paper's authors write them.
LISTS = {
    ("cifar10", 2): "C16 M C16 M",
    ("cifar10", 4): "C16 C16 M C32 C32 M",
    ("cifar10", 6): "C16 C16 M C32 C32 M C64 C64 M",
    ("cifar10", 8): "C16 C16 M C32 C32 M C64 C64 M C128 C128 M F64",
    ("cifar10", 10): "C32 C32 M C64 C64 M C128 C128 M C256 C256 C256 C256 M F128",
    ("cifar100", 2): "C32 M C32 M",
    ("cifar100", 4): "C32 C32 M C64 C64 M",
    ("cifar100", 6): "C32 C32 M C64 C64 M C128 C128",
    ("cifar100", 8): "C32 C32 M C64 C64 M C128 C128 M C256 C256 M F64",
    ("cifar100", 10): "C32 C32 M C64 C64 M C128 C128 M C256 C256 C256 C256 M F512",
}


def _count_by_list(layers: str, channels: int, side: int, classes: int) -> tuple[int, int]:
    """Parameters and multiply-adds from a layer list."""
    parameters = work = 0
    units, flat = channels, False
    for layer in [*layers.split(), f"F{classes}"]:
        if layer == "M":
            side //= 2
        elif layer[0] == "C":
            wide = int(layer[1:])
            parameters += 9 * units * wide + 2 * wide
            work += 9 * units * wide * side**2
            units = wide
        else:
            units = units if flat else units * side**2
            flat = True
            parameters += units * int(layer[1:]) + int(layer[1:])
            work += units * int(layer[1:])
            units = int(layer[1:])
    return parameters, work


@pytest.mark.parametrize(("channels", "size", "classes"), [(3, 32, 10), (1, 16, 10), (3, 37, 100)])
@pytest.mark.parametrize(("table", "depth"), LISTS)
def test_parameters_and_work_are_those_of_the_published_layers(
    table: str, depth: int, channels: int, size: int, classes: int
) -> None:
    model = PlainCNN(depth=depth, table=table)
    network = build_model(model, channels=channels, image_size=size, num_classes=classes)
    counts = count(network, (channels, size, size))
    by_list = _count_by_list(LISTS[table, depth], channels, size, classes)
    assert (counts.parameters, counts.multiply_adds) == by_list


def test_the_smallest_is_as_counted_by_hand() -> None:
    network = build_model(PlainCNN(depth=2), channels=1, image_size=16, num_classes=10)
    counts = count(network, (1, 16, 16))
    # convolutions 144 + 2304, norms 32 + 32, linear 16 * 4 * 4 * 10 + 10
    assert counts.parameters == 144 + 32 + 2304 + 32 + 2570
    # 16 x 16 positions of 144, 8 x 8 positions of 2304, 2560
    assert counts.multiply_adds == 36_864 + 147_456 + 2_560


def test_features_and_classifier_make_the_network() -> None:
    network = build_model(PlainCNN(depth=8), channels=3, image_size=32, num_classes=10).eval()
    images = torch.randn(2, 3, 32, 32)
    assert network.features(images).shape == (2, 128 * 2 * 2)
    assert torch.equal(network.classifier(network.features(images)), network(images))


@pytest.mark.parametrize(("width", "channels"), [(0.01, 1), (0.125, 2), (1.5, 24)])
def test_width_scales_the_channels(width: float, channels: int) -> None:
    network = PlainCNN(depth=2, width=width).build(channels=1, image_size=16, num_classes=10)
    assert network.features[0].out_channels == channels


@pytest.mark.parametrize(("depth", "least"), [(2, 4), (4, 4), (6, 8), (8, 16), (10, 16)])
def test_an_image_too_small_for_the_poolings_is_refused(depth: int, least: int) -> None:
    build_model(PlainCNN(depth=depth, width=0.1), channels=1, image_size=least, num_classes=2)
    with pytest.raises(ConfigError, match=f"needs {least} or more"):
        PlainCNN(depth=depth).build(channels=1, image_size=least - 1, num_classes=2)


def test_a_width_of_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="width"):
        PlainCNN(depth=2, width=0.0)
