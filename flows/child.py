"""Child processes that die with us, can be stopped, and whose output is read line by line."""

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
"""Seconds between checks of the stop event, the deadline and the process."""


class Stopped(Exception):
    """The child was terminated because the run was cancelled."""


class OutOfTime(Exception):
    """The child was terminated because it exceeded its timeout."""


def start(
    command: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str],
    output: int | IO[str],
    hold: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start `command` on a leash (flows/leash.py), in its own session: Ctrl-C reaches only us.

    Args:
        command: The program and its arguments.
        cwd: Its working directory.
        env: Its complete environment.
        output: Where stdout and stderr go; passed to subprocess as `stdout`.
        hold: Descriptors of locks that stay held until the last process has exited, even if
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
    """Release the leash and return once every process on it has exited."""
    if process.stdin:
        process.stdin.close()
    try:
        process.wait(leash.GRACE + 5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.returncode < 0:  # the leash itself was killed, leaving its processes
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
    """Run `command` to completion and return its exit code.

    Args:
        command: The program and its arguments.
        cwd: Its working directory.
        env: Its complete environment.
        hear: Called with each line of its output as it arrives.
        stop: Terminates the command when set.
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
        # Do not wait for EOF: a daemon left behind by the command may hold the pipe open.
        while lines.read(0):
            pass
        lines.close()
        process.stdout.close()
    code = process.returncode
    return code if code >= 0 else 128 - code


class _Lines:
    """Reads lines from a pipe without blocking on an incomplete one."""

    def __init__(self, descriptor: int, hear: Callable[[str], None]) -> None:
        self.descriptor = descriptor
        self.hear = hear
        self.rest = b""
        self.selector = selectors.DefaultSelector()
        self.selector.register(descriptor, selectors.EVENT_READ)
        self.ended = False

    def read(self, patience: float) -> bool:
        """Wait up to `patience` seconds for output, pass it on, return whether there was any."""
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
        """Pass on a last line without a newline."""
        self._say(self.rest)
        self.selector.close()

    def _say(self, line: bytes) -> None:
        # A progress bar rewrites its line: only the text after the last "\r" is visible.
        text = line.decode(errors="replace").rstrip().rsplit("\r", 1)[-1]
        if text:
            self.hear(text)
