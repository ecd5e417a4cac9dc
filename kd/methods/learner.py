"""What is trained where a student does not learn alone.

A learner holds the student and all that trains or changes along with it, so that one optimiser
moves everything and one state_dict resumes it.  In evaluation mode it is its student.

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
"""The student's logits (B, C), and what else a loss is shown (`Shown.also`)."""


class Learner(nn.Module, ABC):
    """A student, and what a subclass puts beside it."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def forward(self, images: Tensor) -> Tensor | Answer:
        """What the loss needs of a batch; in evaluation mode the student's logits alone."""
        return self.answer(images) if self.training else self.student(images)

    @abstractmethod
    def answer(self, images: Tensor) -> Answer:
        """The student's logits, and what else the loss is shown."""

    def after_step(self, done: int) -> None:
        """Change what the optimiser does not: running means, old copies.

        Args:
            done: Steps done so far, this one included.
        """


class Cohort(Learner):
    """Networks that are shown the same images at once: a student and its peers."""

    def __init__(self, student: nn.Module, peers: Sequence[nn.Module]) -> None:
        super().__init__(student)
        self.peers = nn.ModuleList(peers)

    @property
    def networks(self) -> list[nn.Module]:
        """The student, then its peers."""
        return [self.student, *self.peers]

    def answer(self, images: Tensor) -> Answer:
        """Everybody's logits, as `logits_MBC`."""
        logits_MBC = torch.stack([wide(network(images)) for network in self.networks])
        return logits_MBC[0], {"logits_MBC": logits_MBC}

    def answer_with_features(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Everybody's logits (M, B, C), and the features (B, D) that each made them of."""
        logits, features = zip(
            *(with_features(each, images) for each in self.networks), strict=True
        )
        return torch.stack(logits), list(features)


class Frozen(nn.Module):
    """A copy of a network that teaches: it never trains, and is changed only by its owner."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, whatever the rest does: batch statistics would drift."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """The copy's logits."""
        return wide(self.network(images))

    @torch.no_grad()
    def follow(self, network: nn.Module, decay: float = 0.0) -> None:
        """Become decay * self + (1 - decay) * network; counters are taken over as they are."""
        pairs = list(zip(tensors_of(self.network), tensors_of(network), strict=True))
        moving = [pair for pair in pairs if pair[0].is_floating_point()]
        own, theirs = ([pair[side] for pair in moving] for side in (0, 1))
        torch._foreach_lerp_(own, theirs, 1 - decay)  # one kernel for all of them, on a GPU
        for mine, other in pairs:
            if not mine.is_floating_point():
                mine.copy_(other)


def decay_at(step: int, decay: float) -> float:
    """The share of a running mean that stays at step `step`, counted from 0.

    At first it is the plain mean of the weights after each step, as in Tarvainen and Valpola's
    own code: with 0.99 from the start, a third of it would be untrained weights after 100 steps.
    """
    return min(step / (step + 1), decay)


def tensors_of(network: nn.Module) -> list[Tensor]:
    """A network's parameters and buffers, each once, also where layers share one."""
    return [*network.parameters(), *network.buffers()]


def last_linear(network: nn.Module) -> nn.Linear:
    """The layer that turns features into logits.

    Raises:
        ConfigError: the network has none.
    """
    layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ConfigError(
            f"a {type(network).__name__} has no linear layer, whose features this method compares"
        )
    return layers[-1]


def with_features(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """A network's logits (B, C), and the features (B, D) that its last layer made them of."""
    seen: list[Tensor] = []
    handle = last_linear(network).register_forward_pre_hook(
        lambda module, given: seen.append(given[0])
    )
    try:
        logits_BC = network(images)
    finally:
        handle.remove()
    return wide(logits_BC), wide(seen[-1]).flatten(start_dim=1)
