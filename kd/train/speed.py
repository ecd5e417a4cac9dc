"""What is faster on this machine, found by trying: what `auto` in a recipe means."""

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
"""What each `auto` chooses from, in the order in which it is decided; the first of them is taken
unless another one is faster by its GAIN, and stands for those that are not decided yet."""
GAIN = {"precision": 1.2, "memory_format": 1.05, "compile": 1.05}
"""How many times faster the whole training must be: below, bf16's rounding is not worth it, and
the rest cannot be told from chance."""


def fastest(
    model: nn.Module,
    images: Images,
    recipe: Recipe,
    *,
    num_classes: int,
    num_steps: int,
    rounds: int = 3,
) -> dict[str, Any]:
    """What a training of so many steps is fastest with, on this machine.

    Args:
        model: Who will learn; it is left as it is.
        images: What it will be shown.
        recipe: How it will be trained; keys that are "auto" are what is asked for.
        num_classes: C.
        num_steps: Steps of the whole training: what a first step takes, such as compiling, is
            shared out over so many.
        rounds: Steps that are timed with each choice, in turns, after the first.

    Returns:
        The answer for each key of `recipe` that is "auto".
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
    """What a training on labels by each recipe would take: its first step, and all the others."""
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
    """Seconds of one step by the clock; infinitely many where it cannot be compiled, or does not
    fit into memory.
    """
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
    """Give back what was taken for measuring: graphs of a GPU keep their memory for themselves."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def finish(device: torch.device) -> None:
    """Wait until a GPU has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
