"""Child processes that end with us, stop when told to, and whose lines are heard at once."""

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

from flows import leash

POLL = 0.1
"""Seconds between looks at the stop event, the deadline and the process."""


class Stopped(Exception):
    """The child was ended because the run was cancelled."""


class OutOfTime(Exception):
    """The child was ended because it ran longer than it may."""


def start(
    command: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str],
    output: int | IO[str],
    hold: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start `command` on a leash, in a session of its own, so that Ctrl-C reaches only us.

    Args:
        command: The program and its arguments.
        cwd: Folder it runs in.
        env: Its whole environment.
        output: Where standard output and error go, as subprocess wants it.
        hold: Descriptors of locks that stay taken until the last process is gone, even when
            we die first.
    """
    return subprocess.Popen(
        [sys.executable, "-I", "-S", leash.__file__, *command],
        cwd=cwd,
        env=env,
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT,
        pass_fds=hold,
        start_new_session=True,
    )


def end(process: subprocess.Popen[bytes]) -> None:
    """Let go of the leash and return when everything on it is gone."""
    if process.stdin:
        process.stdin.close()
    try:
        process.wait(leash.GRACE + 5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.returncode < 0:  # killed itself, the leash held nothing any more
        _end_session(process.pid)


def _end_session(leader: int) -> None:
    for each in psutil.pids():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getsid(each) == leader:
                os.kill(each, signal.SIGKILL)


def run(
    command: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str],
    hear: Callable[[str], None],
    stop: threading.Event,
    timeout: float | None = None,
    hold: Sequence[int] = (),
) -> int:
    """Run `command` to its end and return its exit code.

    Args:
        command: The program and its arguments.
        cwd: Folder it runs in.
        env: Its whole environment.
        hear: Called with each line of its output, as it comes.
        stop: Ends the command when set.
        timeout: Seconds it may take; None is no limit.
        hold: See `start`.

    Raises:
        Stopped: `stop` was set.
        OutOfTime: `timeout` passed.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    process = start(command, cwd=cwd, env=env, output=subprocess.PIPE, hold=hold)
    assert process.stdout
    lines = _Lines(process.stdout.fileno(), hear)
    try:
        while process.poll() is None:
            lines.read(POLL)
            if stop.is_set():
                raise Stopped
            if deadline is not None and time.monotonic() > deadline:
                raise OutOfTime
    finally:
        end(process)
        # Not "until end of file": a daemon that the command left behind may hold the pipe open.
        while lines.read(0):
            pass
        lines.close()
        process.stdout.close()
    code = process.returncode
    return code if code >= 0 else 128 - code


class _Lines:
    """Lines of a pipe, without waiting for one that does not come."""

    def __init__(self, descriptor: int, hear: Callable[[str], None]) -> None:
        self.descriptor = descriptor
        self.hear = hear
        self.rest = b""
        self.selector = selectors.DefaultSelector()
        self.selector.register(descriptor, selectors.EVENT_READ)
        self.ended = False

    def read(self, patience: float) -> bool:
        """Hear what has come within `patience` seconds; say whether anything did."""
        if self.ended:
            time.sleep(patience)
            return False
        if not self.selector.select(patience):
            return False
        chunk = os.read(self.descriptor, 65536)
        self.ended = not chunk
        *whole, self.rest = (self.rest + chunk).split(b"\n")
        for line in whole:
            self._say(line)
        return bool(chunk)

    def close(self) -> None:
        """Hear a last line that has no newline."""
        self._say(self.rest)
        self.selector.close()

    def _say(self, line: bytes) -> None:
        # A progress bar rewrites its line: what stands after the last carriage return is seen.
        text = line.decode(errors="replace").rstrip().rsplit("\r", 1)[-1]
        if text:
            self.hear(text)
