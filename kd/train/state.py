"""A training's epoch metrics, and its state as named tensors."""

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from kd.component import Refused
from kd.recipe import Recipe


@dataclass(frozen=True)
class Epoch:
    """The metrics of one epoch."""

    number: int
    """From 1."""
    step: int
    """Steps done so far."""
    lr: float
    """Learning rate of the epoch's last step."""
    train_loss: float
    """Mean loss over the epoch's steps."""
    validation: Mapping[str, float] = field(default_factory=dict)
    """What the caller's `validate` returned; empty if this epoch was not validated."""
    images_per_second: float = 0.0
    """Training speed without validation; not reproducible, so kept out of the artifacts."""


class Stopped(Refused):
    """Training was asked to stop; a step's state was saved, an unfinished table was not."""


class Checkpoint(Protocol):
    """Where fit() keeps its state between steps; kd.checkpoint has the one on disk."""

    def load(self) -> tuple[dict[str, Tensor], list[Epoch]] | None:
        """The last saved state and the epochs it covers; None to start from scratch."""

    def save(self, state: dict[str, Tensor], history: list[Epoch]) -> None:
        """Replace the saved state atomically."""


class Saves:
    """Decides when to save: every so many steps or minutes, and when asked to stop."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.last = time.monotonic()

    def due(self, done: int, stopping: bool) -> bool:
        """Whether to save the state after `done` steps, or because training stops."""
        every, minutes = self.recipe.checkpoint_steps, self.recipe.checkpoint_minutes
        by_steps = every is not None and done % every == 0
        if stopping or by_steps or time.monotonic() - self.last >= 60 * minutes:
            self.last = time.monotonic()
            return True
        return False


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state for each parameter, keyed `index/entry`."""
    return {
        f"{index}/{name}": torch.as_tensor(value)
        for index, entries in optimizer.state_dict()["state"].items()
        for name, value in entries.items()
        if value is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    """Restore what `optimizer_state` returned."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    entries: dict[int, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        index, entry = name.split("/")
        parameter = parameters[int(index)]
        if tensor.shape == parameter.shape:
            # The fused optimisers expect the parameter's memory layout.
            tensor = torch.empty_like(parameter, requires_grad=False).copy_(tensor)
        entries.setdefault(int(index), {})[entry] = tensor
    optimizer.load_state_dict({**copy.deepcopy(optimizer.state_dict()), "state": entries})


def joined(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Merge several states into one, as copies that training does not change."""
    return {
        f"{name}/{entry}": tensor.detach().to("cpu", copy=True)
        for name, part in parts.items()
        for entry, tensor in part.items()
    }


def part(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The state that was joined under `name`."""
    return {n.removeprefix(f"{name}/"): t for n, t in state.items() if n.startswith(f"{name}/")}
