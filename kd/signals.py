"""How a process ends on SIGTERM or Ctrl-C."""

import ctypes
import os
import signal
import sys
from types import FrameType

PR_SET_PDEATHSIG = 1
ENDING = (signal.SIGTERM, signal.SIGINT)
"""The signals that ask for an end."""
told: list[int] = []
"""The signals received.  Check it before anything long: third-party code may have swallowed the
exception, as imports, callbacks and `__del__` do."""


def end_quietly() -> None:
    """Have signals end this process with status 128 + N, as in shells, without a traceback.

    A signal ignored from the start, as Ctrl-C is after a shell's `&`, stays ignored.
    """
    for number in ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, interrupt)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Turn a signal into SystemExit, so that files are closed and the run ends as killed."""
    told.append(number)
    raise SystemExit(128 + number)


def end_with(parent: int) -> None:
    """On Linux, have the kernel kill this process when its parent, process `parent`, dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before that
        os._exit(1)
