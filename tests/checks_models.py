"""What every model must do; one line checks your own:

    check_model(MyModel(), channels=3, image_size=32)

Shape suffixes: B batch, C classes.
"""

import torch
from safetensors.torch import load, save
from torch import nn
from torch.nn import functional as F

from kd.models import Model, build_model, count

BATCH = 6
CLASSES = 7


def check_model(model: Model, channels: int = 3, image_size: int = 32) -> None:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn((BATCH, channels, image_size, image_size), generator=generator)
    network = _build(model, images, seed=0)
    check_seed(model, images)
    check_every_parameter_learns(network, images)
    network.eval()
    check_images_do_not_see_each_other(network, images)
    check_formats(network, images)
    check_state_survives_a_file(network, _build(model, images, seed=5), images)
    check_counting_leaves_no_trace(network, images)


def check_seed(model: Model, images: torch.Tensor) -> None:
    one, same, other = (_build(model, images, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


def check_every_parameter_learns(network: nn.Module, images: torch.Tensor) -> None:
    network.train()
    logits_BC = network(images)
    assert logits_BC.shape == (len(images), CLASSES)
    assert logits_BC.dtype == torch.float32
    F.cross_entropy(logits_BC, torch.arange(len(images)) % CLASSES).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, f"no gradient reaches {name}"
        assert parameter.grad.isfinite().all(), f"the gradient of {name} is not finite"
    network.zero_grad()


@torch.no_grad()
def check_images_do_not_see_each_other(network: nn.Module, images: torch.Tensor) -> None:
    logits_BC = network(images)
    _assert_equal_logits(network(images.flip(0)).flip(0), logits_BC)
    _assert_equal_logits(torch.cat([network(image[None]) for image in images]), logits_BC)


@torch.no_grad()
def check_formats(network: nn.Module, images: torch.Tensor) -> None:
    logits_BC = network(images)
    _assert_equal_logits(network(images.to(memory_format=torch.channels_last)), logits_BC)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert network(images).float().isfinite().all()


@torch.no_grad()
def check_state_survives_a_file(
    network: nn.Module, other: nn.Module, images: torch.Tensor
) -> None:
    content = save({key: value.contiguous() for key, value in network.state_dict().items()})
    other.load_state_dict(load(content))
    assert torch.equal(other.eval()(images), network(images))


def check_counting_leaves_no_trace(network: nn.Module, images: torch.Tensor) -> None:
    network.train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    random_state = torch.get_rng_state()
    counts = count(network, tuple(images.shape[1:]))
    assert counts.parameters == sum(p.numel() for p in network.parameters())
    assert counts.multiply_adds > 0
    assert network.training
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


def _build(model: Model, images: torch.Tensor, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    _, channels, size, _ = images.shape
    return build_model(model, channels=channels, image_size=size, num_classes=CLASSES)


def _assert_equal_logits(found_BC: torch.Tensor, wanted_BC: torch.Tensor) -> None:
    """Equal up to the order of float32 sums, measured on the scale of all logits."""
    scale = wanted_BC.abs().max().clamp(min=1e-6)
    torch.testing.assert_close(found_BC / scale, wanted_BC / scale, rtol=0, atol=2e-4)
