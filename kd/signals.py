"""How a process ends that SIGTERM or Ctrl-C tells to."""

import signal
from types import FrameType

ENDING = (signal.SIGTERM, signal.SIGINT)
"""What asks for an end."""


def end_quietly() -> None:
    """Let them end this process as shells have it, by status 128 + N, without a traceback.

    One that it was started to ignore, as a shell's `&` does with Ctrl-C, stays ignored.
    """
    for number in ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, interrupt)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Turn a signal into an exception, so that files are closed and the run ends as killed."""
    raise SystemExit(128 + number)
