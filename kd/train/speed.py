"""What is faster on this machine, found by trying."""

import copy
import time
from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from kd.data import Images
from kd.recipe import Recipe
from kd.train.lesson import Lesson

Precision = Literal["fp32", "bf16"]
GAIN = 1.2
"""How many times faster bf16 must be: below, its rounding is not worth it."""


def faster_precision(
    model: nn.Module, images: Images, recipe: Recipe, num_classes: int, rounds: int = 3
) -> Precision:
    """The precision that a step of this training is faster in, on this machine.

    Args:
        model: Who will learn; it is left as it is.
        images: What it will be shown.
        recipe: How it will be trained.
        num_classes: C.
        rounds: Steps that are timed in each precision, in turns, after one that is not.
    """
    best: dict[Precision, float] = {"fp32": float("inf"), "bf16": float("inf")}
    with torch.random.fork_rng(devices=[]):
        for turn in range(rounds + 1):
            for precision in best:
                seconds = step_seconds(
                    model, images, replace(recipe, precision=precision), num_classes
                )
                if turn:
                    best[precision] = min(best[precision], seconds)
    return "bf16" if best["fp32"] > GAIN * best["bf16"] else "fp32"


def step_seconds(model: nn.Module, images: Images, recipe: Recipe, num_classes: int) -> float:
    """Seconds of one forward and backward pass of a copy of the model on labels."""
    device = images.labels_N.device
    probe = copy.deepcopy(model).to(device).to(memory_format=torch.channels_last).train()
    lesson = Lesson(images, recipe, 0, num_classes, None, None)
    finish(device)
    started = time.perf_counter()
    torch.autograd.grad(lesson.loss(probe, 0), list(probe.parameters()), allow_unused=True)
    finish(device)
    return time.perf_counter() - started


def finish(device: torch.device) -> None:
    """Wait until a GPU has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
