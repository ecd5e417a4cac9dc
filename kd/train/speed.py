"""Resolve the recipe's `auto` settings by measuring which is fastest on this machine."""

import copy
import gc
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from kd.component import ConfigError, Refused
from kd.data import Images
from kd.recipe import Recipe
from kd.train.lesson import Lesson
from kd.train.loop import Training
from kd.train.plan import Plan

CHOICES: dict[str, tuple[str | bool, ...]] = {
    "precision": ("fp32", "bf16"),
    "memory_format": ("channels_last", "contiguous"),
    "compile": (False, True),
}
"""The options of each `auto` setting; settings are decided in this order.  The first option is
used until its setting is decided, and is kept unless another one is faster by the GAIN."""
GAIN = {"precision": 1.2, "memory_format": 1.05, "compile": 1.05}
"""How many times faster the whole training must be: less does not justify bf16's rounding and,
for the other settings, is within measurement noise."""


def fastest(
    model: nn.Module,
    images: Images,
    recipe: Recipe,
    *,
    num_classes: int,
    num_steps: int,
    rounds: int = 3,
) -> dict[str, Any]:
    """The fastest options on this machine for a training of `num_steps` steps.

    Args:
        model: The network to be trained; it is not changed.
        images: The training images.
        recipe: The recipe, with some keys "auto".
        num_classes: C.
        num_steps: Steps of the whole training, over which the cost of the first one (such as
            compiling) is spread.
        rounds: Steps that are timed with each option, in turns, after the first.

    Returns:
        The chosen option for each key of `recipe` that is "auto".
    """
    wanted = [name for name in CHOICES if getattr(recipe, name) == "auto"]
    found: dict[str, Any] = {name: CHOICES[name][0] for name in wanted}
    with torch.random.fork_rng(devices=[]):
        for name in wanted:
            recipes = [replace(recipe, **{**found, name: each}) for each in CHOICES[name]]
            costs = seconds(model, images, recipes, num_classes, num_steps, rounds)
            for choice, cost in zip(CHOICES[name][1:], costs[1:], strict=True):
                if costs[0] > GAIN[name] * cost:
                    found[name] = choice
    let_go(images.labels_N.device)
    return found


def seconds(
    model: nn.Module,
    images: Images,
    recipes: Sequence[Recipe],
    num_classes: int,
    num_steps: int,
    rounds: int,
) -> list[float]:
    """Estimated seconds of a training on labels with each recipe, first step included."""
    device = images.labels_N.device
    trainings = []
    for recipe in recipes:
        lesson = Lesson(images, recipe, 0, num_classes, None, None)
        training = Training(copy.deepcopy(model).to(device), lesson, Plan(recipe, num_steps))
        trainings.append(training)
    taken = [
        [step_seconds(training, step) for training in trainings] for step in range(1 + rounds)
    ]
    return [first + (num_steps - 1) * min(rest) for first, *rest in zip(*taken, strict=True)]


def step_seconds(training: Training, step: int) -> float:
    """Wall-clock seconds of one step; infinite if it cannot be compiled or runs out of memory."""
    device = training.watch.losses_S.device
    finish(device)
    started = time.perf_counter()
    try:
        training.step(step)
    except (ConfigError, Refused):
        return math.inf
    finish(device)
    return time.perf_counter() - started


def let_go(device: torch.device) -> None:
    """Free the memory used for measuring; CUDA graphs would keep theirs."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def finish(device: torch.device) -> None:
    """Wait until a GPU has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
