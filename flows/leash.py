"""Run a command that cannot outlive whoever started it: `python leash.py COMMAND...`.

Standard input is the leash.  It is one end of a pipe that only the starter holds, so it ends when
the starter lets go, and also when the starter dies by `kill -9`.  Then every process of the
command's group gets SIGTERM, and SIGKILL after GRACE seconds: DVC alone would leave its training
process running, unseen, and a second run would start another one beside it.  SIGTERM to the leash
does the same; supervisord ends its programs so.

Nothing but the standard library, so that it starts in 20 ms (`python -I -S`).
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

GRACE = 10.0
"""Seconds between SIGTERM and SIGKILL: time for a stage to save its state and end its records."""
TOLD = threading.Lock()
"""Taken by whoever sends SIGTERM: to a stage that saves, a second one means "at once"."""


def main(command: list[str]) -> int:
    """Run `command` in its own process group; return its exit code."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0)
    threading.Thread(target=_hold, args=(child.pid,), daemon=True).start()

    def let_go(*_: object) -> None:
        # In a thread: here we must be waiting, or the child stays in the table as a zombie.
        threading.Thread(target=_end_group, args=(child.pid,), daemon=True).start()

    signal.signal(signal.SIGTERM, let_go)
    code = child.wait()
    _end_group(child.pid)  # also where the command itself was killed, and left its children
    return code if code >= 0 else 128 - code


def _hold(group: int) -> None:
    os.read(0, 1)
    _end_group(group)


def _end_group(group: int) -> None:
    """Return once no process of the group is left, or SIGKILL was sent."""
    with contextlib.suppress(ProcessLookupError):
        if TOLD.acquire(blocking=False):
            os.killpg(group, signal.SIGTERM)
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline:
            time.sleep(0.05)
            os.killpg(group, 0)
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
