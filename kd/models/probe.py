"""Run a network to check or measure it, without side effects.

Shape suffixes: B batch, C classes, H W image.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kd.component import ConfigError

if TYPE_CHECKING:
    from kd.models import Model


@dataclass(frozen=True, kw_only=True)
class Counts:
    """The size of a network and its compute."""

    parameters: int
    """Trainable and frozen, shared ones counted once; without buffers."""

    multiply_adds: int
    """Of convolutions and matrix products, for one image."""


def build_model(model: "Model", *, channels: int, image_size: int, num_classes: int) -> nn.Module:
    """Build a network and try it in training and eval mode.

    Args:
        model: the configuration.
        channels: 1 (grey) or 3 (colour).
        image_size: side of the square images, in pixels.
        num_classes: number of logits.

    Returns:
        The network on the CPU, in training mode.  Call torch.manual_seed first to fix its weights.

    Raises:
        ConfigError: it cannot be built, or does not turn such images into logits.
    """
    network = model.build(channels=channels, image_size=image_size, num_classes=num_classes)
    for training, size in ((True, 2), (False, 2), (False, 1)):
        with untouched(network), torch.no_grad():
            network.train(training)
            try:
                logits_BC = network(torch.zeros(size, channels, image_size, image_size))
            except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
                raise ConfigError(
                    f"{model} cannot take images of {channels} x {image_size} x "
                    f"{image_size} (channels, height, width): {error}"
                ) from error
        found = (
            tuple(logits_BC.shape) if isinstance(logits_BC, Tensor) else type(logits_BC).__name__
        )
        if found != (size, num_classes):
            mode = "training" if training else "evaluation"
            images = "one image" if size == 1 else "two images"
            raise ConfigError(
                f"{model} returns {found} in {mode} mode; {images} and {num_classes} "
                f"classes need one tensor of logits of shape {(size, num_classes)}"
            )
    return network.train()


def count(network: nn.Module, shape: tuple[int, int, int]) -> Counts:
    """Count parameters, and measure the multiply-adds of one image.

    Args:
        network: on any device; left unchanged.
        shape: (channels, H, W) of one image.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    like = next(network.parameters(), torch.empty(0))
    image = torch.zeros((1, *shape), dtype=like.dtype, device=like.device)
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the counter misses fused attention
    try:
        with (
            untouched(network),
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            network.eval()(image)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return Counts(
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        multiply_adds=counter.get_total_flops() // 2,  # torch counts a multiply-add as two
    )


@contextmanager
def untouched(network: nn.Module) -> Iterator[None]:
    """Restore modes, buffers (batch norm's statistics) and the CPU's random state afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module, training in modes:
            module.training = training
        for buffer, before in buffers:
            with torch.no_grad():
                buffer.copy_(before)
