"""Run a command that cannot outlive the process that started it: `python leash.py COMMAND...`.

Standard input is the leash: a pipe whose other end only the parent holds, so it reaches EOF when
the parent closes it or dies, even by `kill -9`.  Then every process in the command's process
group gets SIGTERM, and SIGKILL after GRACE seconds; DVC alone would leave its training process
running unnoticed, and a second run would start another one alongside it.  SIGTERM to the leash
does the same; this is how supervisord stops its programs.

Uses only the standard library, so that it starts in 20 ms (`python -I -S`).
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

GRACE = 10.0
"""Seconds between SIGTERM and SIGKILL: time for a stage to save state and close its records."""
TOLD = threading.Lock()
"""Makes sure SIGTERM is sent only once: a second one tells a stage that is saving to quit now."""


def main(command: list[str]) -> int:
    """Run `command` in its own process group; return its exit code."""
    told, tell = os.pipe()
    # Before the command starts: a SIGTERM in between would leave it running without a leash.
    signal.signal(signal.SIGTERM, lambda *_: os.write(tell, b"."))
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0)
    for end in (0, told):
        # In threads: the main thread must stay in wait(), or the child remains a zombie.
        threading.Thread(target=_hold, args=(end, child.pid), daemon=True).start()
    code = child.wait()
    _end_group(child.pid)  # the command may have been killed and left children behind
    return code if code >= 0 else 128 - code


def _hold(end: int, group: int) -> None:
    os.read(end, 1)
    _end_group(group)


def _end_group(group: int) -> None:
    """Terminate the group; return once no process is left or SIGKILL was sent."""
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
