"""How a process ends that SIGTERM or Ctrl-C tells to."""

import ctypes
import os
import signal
import sys
from types import FrameType

PR_SET_PDEATHSIG = 1
ENDING = (signal.SIGTERM, signal.SIGINT)
"""What asks for an end."""
told: list[int] = []
"""Which of them came.  Whoever begins something long asks, since code of others may have swallowed
the exception: imports, callbacks and `__del__` do."""


def end_quietly() -> None:
    """Let them end this process as shells have it, by status 128 + N, without a traceback.

    One that it was started to ignore, as a shell's `&` does with Ctrl-C, stays ignored.
    """
    for number in ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, interrupt)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Turn a signal into an exception, so that files are closed and the run ends as killed."""
    told.append(number)
    raise SystemExit(128 + number)


def end_with(parent: int) -> None:
    """Have the kernel kill this process when its parent, process `parent`, dies; on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was too late for that
        os._exit(1)
