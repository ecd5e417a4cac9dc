"""Measure how long one call takes, for several candidates side by side.

Shapes: B batch, C classes, H W image.
"""

import statistics
from collections.abc import Callable, Mapping
from functools import partial
from time import perf_counter

import torch
from torch import Tensor, nn

from kd.exporters.files import Runner, for_export, torch_threads

CALLS_A_TURN = 5


def latency(
    candidates: Mapping[str, Callable[[Tensor], Tensor]],
    example_BCHW: Tensor,
    threads: int = 1,
    seconds: float = 2.0,
) -> dict[str, dict[str, float]]:
    """Measure the milliseconds that each candidate takes for `example_BCHW`.

    Candidates take turns of a few calls until the time is up, so that other load on the machine
    affects them all alike.  The first call of each turn is not counted.

    Args:
        candidates: By name: eager networks (nn.Module; a copy is measured, in eval mode, on the
            CPU, without autograd) and loaded files (`Runner`).
        example_BCHW: The images of one call; a file that takes pictures gets as many black ones.
        threads: Threads for eager networks; each `Runner` must have been loaded with as many.
        seconds: How long to measure all candidates together, with at least three turns each.

    Returns:
        By name: median_ms, p90_ms, n (number of timed calls), threads, batch_size.

    Raises:
        ValueError: a runner was loaded with another number of threads.
    """
    for name, candidate in candidates.items():
        if isinstance(candidate, Runner) and candidate.threads != threads:
            raise ValueError(f"{name} was loaded with {candidate.threads} threads, not {threads}")
    calls = {name: _call(candidate, example_BCHW) for name, candidate in candidates.items()}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    with torch_threads(threads), torch.inference_mode():
        _turns(calls, seconds, taken)
    return {
        name: {
            "median_ms": statistics.median(times),
            "p90_ms": statistics.quantiles(times, n=10)[-1],
            "n": len(times),
            "threads": threads,
            "batch_size": len(example_BCHW),
        }
        for name, times in taken.items()
    }


def _call(candidate: Callable[[Tensor], Tensor], example_BCHW: Tensor) -> Callable[[], Tensor]:
    """A call of the candidate with its kind of input."""
    if isinstance(candidate, nn.Module):
        return partial(for_export(candidate), example_BCHW)
    if isinstance(candidate, Runner) and candidate.pictures:
        return partial(candidate, candidate.blank(len(example_BCHW)))
    return partial(candidate, example_BCHW)


def _turns(
    calls: Mapping[str, Callable[[], Tensor]], seconds: float, taken: dict[str, list[float]]
) -> None:
    for call in calls.values():  # warm-up: allocations, lazily built kernels
        for _ in range(CALLS_A_TURN):
            call()
    end, turns = perf_counter() + seconds, 0
    while turns < 3 or perf_counter() < end:
        for name, call in calls.items():
            call()  # untimed: brings this candidate's weights back into the caches
            taken[name].extend(_milliseconds(call) for _ in range(CALLS_A_TURN))
        turns += 1


def _milliseconds(call: Callable[[], Tensor]) -> float:
    begin = perf_counter()
    call()
    return (perf_counter() - begin) * 1e3
