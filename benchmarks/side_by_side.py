"""Timing of several cases in one run, in turns, so that a busy machine slows all of them alike."""

import os
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping

import torch

Case = Callable[[], object]


def in_turns(
    cases: Mapping[str, Case], rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, list[float]]:
    """Seconds (CPU seconds by default) of each case in each round, after one not counted.

    A case that fails is left out, and the others are measured.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(rounds + 1):
        for name in list(seconds):
            started = clock()
            try:
                cases[name]()
            except Exception:  # such as what cannot be compiled here
                traceback.print_exc()
                print(f"\n{name}: failed, see above\n", file=sys.stderr, flush=True)
                del seconds[name]
                continue
            if turn:
                seconds[name].append(clock() - started)
    return seconds


def ratios(seconds: Mapping[str, list[float]], of: str, to: str) -> str:
    """Median and range over the rounds of one case's time by another's."""
    each = [a / b for a, b in zip(seconds[of], seconds[to], strict=True)]
    return f"{statistics.median(each):.2f} ({min(each):.2f}-{max(each):.2f})"


def machine() -> str:
    """What the figures were measured on."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores"
        f"{gpu}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
