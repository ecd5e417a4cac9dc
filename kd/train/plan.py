"""A step's images, views and learning rate: pure functions of its number.

B batch, N samples.  Nothing here depends on earlier steps: a resumed run needs no sampler state.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kd.component import require
from kd.data import Augment, order_for
from kd.recipe import Recipe


class Plan:
    """The steps of each epoch, their learning rates, and which epochs are validated."""

    def __init__(self, recipe: Recipe, per_epoch: int) -> None:
        for name in ("precision", "memory_format", "compile"):
            wanted = "settled before training: kd.train.speed.fastest measures what is fastest"
            require(getattr(recipe, name) != "auto", f"recipe.{name}", "auto", wanted)
        self.recipe = recipe
        self.per_epoch = per_epoch
        self.total = per_epoch * recipe.epochs

    def steps(self, epoch: int) -> range:
        """Numbers of the steps of epoch `epoch`, from 0."""
        return range(epoch * self.per_epoch, (epoch + 1) * self.per_epoch)

    def lr(self, step: int) -> float:
        """The schedule at the middle of the step, so that no step is taken at rate 0."""
        return self.recipe.optimizer.lr * self.recipe.schedule.factor((step + 0.5) / self.total)

    def validates(self, epoch: int) -> bool:
        """Whether to validate after epoch `epoch`."""
        done = epoch + 1
        return done % self.recipe.validate_every == 0 or done == self.recipe.epochs


def steps_in_epoch(num_images: int, batch_size: int) -> int:
    """Steps of one pass over the images, every batch full; at least 1."""
    return max(1, math.ceil(num_images / batch_size))


@dataclass(frozen=True)
class Batch:
    """The images of a step and their views."""

    indices_B: Tensor
    """Positions in the images."""
    views_B: Tensor
    """View of each (kd/data/augment.py)."""
    passes_B: Tensor
    """Number of the pass over the images that each belongs to; modulo `views` if views recur."""

    def share(self, index: int, count: int) -> "Batch":
        """Part `index` of `count` equal ones.

        Image i from the start goes with image i from the end, as mixup pairs them.
        """
        size = len(self.indices_B)
        head = torch.arange(index, size // 2, count, device=self.indices_B.device)
        taken = torch.cat([head, (size - 1 - head).flip(0)])
        return Batch(self.indices_B[taken], self.views_B[taken], self.passes_B[taken])


@lru_cache(maxsize=4)
def pass_of(
    number: int, num_images: int, augment: Augment, seed: int, views: int | None, device: str
) -> Batch:
    """All images of pass `number`, in the order and views of that pass."""
    recurring = number if views is None else number % views
    # Recurring views do not depend on the seed, so that students of all seeds share targets.
    views_N = augment.views_for(seed if views is None else 0, recurring, num_images)
    order_N = order_for(seed, number, num_images)
    passes_N = torch.full_like(order_N, recurring)
    return Batch(order_N.to(device), views_N[order_N].to(device), passes_N.to(device))


def batch_of(
    step: int,
    batch_size: int,
    num_images: int,
    augment: Augment,
    seed: int,
    views: int | None = None,
    device: str = "cpu",
) -> Batch:
    """The images and views of a step.

    Batches are cut from an endless sequence of shuffled passes, so every batch is full, even at
    the end of a pass or with fewer images than a batch holds.

    Args:
        step: Number of the step, from 0.
        batch_size: B.
        num_images: N.
        augment: The possible views.
        seed: Decides the order of images, and their views unless these recur.
        views: Passes after which views recur; None: each pass draws new ones.
        device: Device of the returned tensors.
    """
    parts = []
    position = step * batch_size
    end = position + batch_size
    while position < end:
        number, offset = divmod(position, num_images)
        whole = pass_of(number, num_images, augment, seed, views, device)
        taken = slice(offset, offset + end - position)
        parts.append((whole.indices_B[taken], whole.views_B[taken], whole.passes_B[taken]))
        position += len(parts[-1][0])
    if len(parts) == 1:
        return Batch(*parts[0])
    return Batch(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
