"""Modules that hold a student together with everything that trains along with it.

One optimiser updates all of a learner, and one state_dict resumes it.  In eval mode it acts as
its student.

B batch, M networks (the student first), C classes, D features.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from kd.component import ConfigError
from kd.methods.losses import wide

Answer = tuple[Tensor, Mapping[str, Tensor]]
"""The student's logits (B, C), and further tensors for the loss (`Shown.also`)."""


class Learner(nn.Module, ABC):
    """A student, and whatever a subclass adds to it."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def forward(self, images: Tensor) -> Tensor | Answer:
        """What the loss needs from a batch; in eval mode the student's logits alone."""
        return self.answer(images) if self.training else self.student(images)

    @abstractmethod
    def answer(self, images: Tensor) -> Answer:
        """The student's logits, and further tensors for the loss."""

    def after_step(self, done: int) -> None:
        """Update what the optimiser does not: running means, stale copies.

        Args:
            done: Steps done so far, including this one.
        """


class Cohort(Learner):
    """Networks that see the same batches: a student and its peers."""

    def __init__(self, student: nn.Module, peers: Sequence[nn.Module]) -> None:
        super().__init__(student)
        self.peers = nn.ModuleList(peers)

    @property
    def networks(self) -> list[nn.Module]:
        """The student, then its peers."""
        return [self.student, *self.peers]

    def answer(self, images: Tensor) -> Answer:
        """The student's logits, and all networks' as `logits_MBC`."""
        logits_MBC = torch.stack([wide(network(images)) for network in self.networks])
        return logits_MBC[0], {"logits_MBC": logits_MBC}

    def answer_with_features(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """All logits (M, B, C), and the inputs (B, D) of each network's last linear layer."""
        logits, features = zip(
            *(with_features(each, images) for each in self.networks), strict=True
        )
        return torch.stack(logits), list(features)


class Frozen(nn.Module):
    """A copy of a network that teaches: no gradient, and only its owner updates it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode; otherwise its batch statistics would drift."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """The copy's logits."""
        return wide(self.network(images))

    @torch.no_grad()
    def follow(self, network: nn.Module, decay: float = 0.0) -> None:
        """Set to decay * self + (1 - decay) * network; integer buffers are copied."""
        pairs = list(zip(tensors_of(self.network), tensors_of(network), strict=True))
        moving = [pair for pair in pairs if pair[0].is_floating_point()]
        own, theirs = ([pair[side] for pair in moving] for side in (0, 1))
        torch._foreach_lerp_(own, theirs, 1 - decay)  # one kernel for all tensors on a GPU
        for mine, other in pairs:
            if not mine.is_floating_point():
                mine.copy_(other)


def decay_at(step: int, decay: float) -> float:
    """The decay of a running mean at step `step`, counted from 0.

    The mean starts as the plain mean of the weights after each step, as in Tarvainen and Valpola's
    code: with 0.99 from the start, a third of it would be untrained weights after 100 steps.
    """
    return min(step / (step + 1), decay)


def tensors_of(network: nn.Module) -> list[Tensor]:
    """A network's parameters and buffers, each once even if layers share it."""
    return [*network.parameters(), *network.buffers()]


def last_linear(network: nn.Module) -> nn.Linear:
    """A network's last linear layer, which turns features into logits.

    Raises:
        ConfigError: the network has none.
    """
    layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ConfigError(
            f"{type(network).__name__} has no linear layer, whose inputs this method compares"
        )
    return layers[-1]


def with_features(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """A network's logits (B, C), and the features (B, D) that enter its last linear layer."""
    seen: list[Tensor] = []
    handle = last_linear(network).register_forward_pre_hook(
        lambda module, given: seen.append(given[0])
    )
    try:
        logits_BC = network(images)
    finally:
        handle.remove()
    return wide(logits_BC), wide(seen[-1]).flatten(start_dim=1)
