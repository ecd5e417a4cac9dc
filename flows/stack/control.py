"""To speak with supervisord, the process that keeps the others up."""

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
"""Linux takes 107 bytes, and supervisord adds its process id while it makes the socket."""
PATIENCE = 20.0
"""Seconds that supervisord has to start."""
STOP_PATIENCE = 90.0
"""Seconds until all are gone: each has ten between SIGTERM and SIGKILL."""


@dataclass(frozen=True)
class Program:
    """What supervisord knows of one of them."""

    name: str
    state: str
    pid: int
    seconds: int
    """Since it started, where it runs."""


def runs(settings: Settings) -> bool:
    """Whether this stack's supervisord is there."""
    try:
        with _supervisor(settings) as supervisor:
            return bool(supervisor.getState())
    except OSError:
        return False


def launch(settings: Settings) -> None:
    """Start supervisord; its programs wait to be started.

    Raises:
        StackError: it does not start; the message says what it said.
    """
    path = programs.socket(settings)
    if len(str(path)) > LONGEST_SOCKET - len(".4194304"):
        raise StackError(f"{path} is too long a name for a socket: set STACK_FOLDER to a shorter")
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
    """All programs, in the order of their start."""
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
    """Do nothing while the program runs or is about to.

    Args:
        settings: The stack.
        name: The program.
        again: It may fall at first; supervisord tries four times.

    Raises:
        StackError: it fell; the message has its last words.
    """
    state = next(each.state for each in status(settings) if each.name == name)
    if state not in ("starting", "running", *(("backoff",) if again else ())):
        path = programs.log(settings, name)
        last = "\n".join(path.read_text().splitlines()[-15:])
        raise StackError(f"{name} did not start ({path}):\n{last}")


def stop(settings: Settings) -> None:
    """End all programs, the last one first, and supervisord; return when they are gone.

    Raises:
        StackError: they are still there after a minute and a half.
    """
    with _supervisor(settings) as supervisor:
        pid = supervisor.getPID()
        supervisor.shutdown()
    deadline = time.monotonic() + STOP_PATIENCE
    while psutil.pid_exists(pid):
        if time.monotonic() > deadline:
            raise StackError(f"supervisord does not end; see {settings.folder / 'logs'}")
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
