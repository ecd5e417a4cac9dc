"""Several processes (ranks) that train one network, started and ended as if they were one.

What `torchrun --standalone` does, but for what people and tools see: one error where all ranks
fail, the exit status that a lone process would have, and no time limit for a rank that saves its
state because it was told to stop.  It needs no torch, so it costs no second import.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType

from kd import warm

POLL = 0.05
"""Seconds between looks at the ranks."""
GRACE = 30.0
"""Seconds that the others are given once a rank has failed: they may wait for it for ever."""
TOLD = "told"
"""The file by which ranks agree who tells of a failure; it holds the exit status."""


def run(command: Sequence[str], count: int) -> int:
    """Run `command` as `count` ranks, and hand them the signals that we get.

    Returns:
        The exit status that one process would have: that of the rank which failed first.
    """
    heard: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        heard.append(number)

    usual = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    for number, handler in usual.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, note)
    with tempfile.TemporaryDirectory(prefix="kd-ranks-", ignore_cleanup_errors=True) as folder:
        try:
            statuses = watch([start(command, each, count, folder) for each in range(count)], heard)
        finally:
            for number, handler in usual.items():
                signal.signal(number, handler)
        if not any(statuses):
            return 0
        if heard:
            return 128 + heard[0]
        told = Path(folder, TOLD)
        return int(told.read_text()) if told.exists() else next(filter(None, statuses))


def start(command: Sequence[str], rank: int, count: int, folder: str) -> subprocess.Popen[bytes]:
    """Start one rank, in a session of its own, so that Ctrl-C reaches it through us alone."""
    environment = {
        **os.environ,
        "RANK": str(rank),  # these three as torchrun names them
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "KD_RANKS": folder,
        "KD_LAUNCHER": str(os.getpid()),
    }
    # Not closing what we inherited: a slot's locks are to be held until its last process is gone.
    return subprocess.Popen(command, env=environment, start_new_session=True, close_fds=False)


def watch(ranks: Sequence[subprocess.Popen[bytes]], heard: Sequence[int]) -> list[int]:
    """Wait until all ranks have ended, killing those that outlive one that failed; the statuses.

    Args:
        ranks: Processes.
        heard: Signals that we get, in a list that grows.
    """
    handed_on = 0
    deadline = float("inf")
    while any(each.poll() is None for each in ranks):
        for number in heard[handed_on:]:
            handed_on += 1
            for each in ranks:
                each.send_signal(number)
        if deadline == float("inf") and any(each.returncode for each in ranks):
            deadline = time.monotonic() + GRACE
        if time.monotonic() > deadline:
            for each in ranks:
                each.kill()
        time.sleep(POLL)
    statuses = [each.wait() for each in ranks]
    return [status if status >= 0 else 128 - status for status in statuses]


def become_rank() -> None:
    """Live no longer than who started us, and leave it to the first rank that fails to say why."""
    warm.end_with(int(os.environ["KD_LAUNCHER"]))
    sys.excepthook = tell


def tell(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None = None
) -> None:
    """Print an exception that nobody caught, where it is for this rank to tell."""
    if not issubclass(kind, KeyboardInterrupt) and falls_first(1):
        sys.__excepthook__(kind, error, trace)


def falls_first(status: int) -> bool:
    """Whether it is for this process, which ends with `status`, to say why.

    It is for a lone process, and for the first of several ranks: the others end for the same
    reason, or because it did.
    """
    if "KD_RANKS" not in os.environ:
        return True
    try:
        with Path(os.environ["KD_RANKS"], TOLD).open("x") as told:
            told.write(str(status))
    except FileExistsError:
        return False
    return True
