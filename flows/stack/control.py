"""Control supervisord, the process that starts the stack's programs and keeps them up."""

import http.client
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
from supervisor.xmlrpc import SupervisorTransport

from flows.stack import programs
from flows.stack.settings import Settings, StackError

LONGEST_SOCKET = 100
"""Longest path, in bytes: Linux allows 107, and supervisord appends its PID to create it."""
PATIENCE = 20.0
"""Seconds that supervisord may take to start."""
STOP_PATIENCE = 90.0
"""Seconds that stopping may take: each program has ten between SIGTERM and SIGKILL."""


@dataclass(frozen=True)
class Program:
    """What supervisord reports about one program."""

    name: str
    state: str
    pid: int
    seconds: int
    """Since its start, if it is running."""


def runs(settings: Settings) -> bool:
    """Whether this stack's supervisord is running."""
    try:
        with _supervisor(settings) as supervisor:
            return bool(supervisor.getState())
    except OSError:
        return False


def launch(settings: Settings) -> None:
    """Start supervisord, but none of its programs yet.

    Raises:
        StackError: it does not start; the message has its output.
    """
    path = programs.socket(settings)
    if len(str(path)) > LONGEST_SOCKET - len(".4194304"):
        raise StackError(f"{path} is too long for a socket: set STACK_FOLDER to a shorter path")
    command = [sys.executable, "-m", "supervisor.supervisord"]
    done = subprocess.run(
        [*command, "--configuration", str(programs.write(settings))],
        cwd=settings.root,
        env=programs.environment(settings),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    deadline = time.monotonic() + PATIENCE
    while not runs(settings):
        if done.returncode or time.monotonic() > deadline:
            raise StackError(f"supervisord did not start:\n{done.stdout}{done.stderr}".rstrip())
        time.sleep(0.1)


def start(settings: Settings, name: str) -> None:
    """Start a program without waiting for it."""
    with _supervisor(settings) as supervisor:
        supervisor.startProcess(name, False)


def status(settings: Settings) -> list[Program]:
    """All programs, in the order in which they start."""
    with _supervisor(settings) as supervisor:
        found = {each["name"]: each for each in supervisor.getAllProcessInfo()}
    return [
        Program(
            name=name,
            state=str(found[name]["statename"]).lower(),
            pid=int(found[name]["pid"]),
            seconds=int(found[name]["now"]) - int(found[name]["start"]),
        )
        for name in programs.ORDER
    ]


def check(settings: Settings, name: str, *, again: bool = False) -> None:
    """Raise unless the program is running or starting.

    Args:
        settings: The stack.
        name: The program.
        again: Accept that it failed and is being restarted; supervisord tries four times.

    Raises:
        StackError: it failed; the message has its last lines.
    """
    state = next(each.state for each in status(settings) if each.name == name)
    if state not in ("starting", "running", *(("backoff",) if again else ())):
        path = programs.log(settings, name)
        last = "\n".join(path.read_text().splitlines()[-15:])
        raise StackError(f"{name} did not start ({path}):\n{last}")


def stop(settings: Settings) -> None:
    """Stop all programs in reverse order, then supervisord; return once they are gone.

    Raises:
        StackError: they are still running after a minute and a half.
    """
    with _supervisor(settings) as supervisor:
        pid = supervisor.getPID()
        supervisor.shutdown()
    deadline = time.monotonic() + STOP_PATIENCE
    while psutil.pid_exists(pid):
        if time.monotonic() > deadline:
            raise StackError(f"supervisord does not stop; see {settings.folder / 'logs'}")
        time.sleep(0.1)


@contextmanager
def _supervisor(settings: Settings) -> Iterator[Any]:
    transport = SupervisorTransport(None, None, f"unix://{programs.socket(settings)}")
    try:
        yield xmlrpc.client.ServerProxy("http://127.0.0.1", transport=transport).supervisor
    except http.client.HTTPException as error:
        raise ConnectionError(f"supervisord hung up: {error}") from error
    finally:
        transport.close()
