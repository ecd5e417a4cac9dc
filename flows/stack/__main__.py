"""`python -m flows.stack start`, `status`, `stop`: see docs/stack.md."""

import argparse
import base64
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import filelock
from rich.console import Console
from rich.table import Table

from flows import leash, server
from flows.stack import control, postgres, programs, settings
from flows.stack.settings import USER, Settings, StackError

STARTUP_SECONDS = 300
"""On first start, both servers create their tables: a minute on two slow cores."""
LAST_RITES = leash.GRACE + 5
"""Seconds until the programs of a killed supervisord have released their ports."""


def main() -> int:
    """Start the stack in the background, show its status, or stop it."""
    commands = {"start": start, "status": status, "stop": stop}
    parser = argparse.ArgumentParser(prog="python -m flows.stack", description=main.__doc__)
    parser.add_argument("command", choices=commands)
    command: Callable[[Settings, Console], int] = commands[parser.parse_args().command]
    console = Console(highlight=False, soft_wrap=True)
    server.bypass_proxy()
    try:
        return command(settings.read(Path.cwd()), console)
    except StackError as error:
        Console(stderr=True, style="bold red", highlight=False, soft_wrap=True).print(
            f"error: {error}", markup=False
        )
        return 1


def start(stack: Settings, console: Console) -> int:
    """Start the stack unless it runs already; 0 if every program runs in the end."""
    settings.refuse_open_doors(stack)
    stack.folder.mkdir(parents=True, exist_ok=True)
    (stack.folder / "logs").mkdir(exist_ok=True)
    try:
        with filelock.FileLock(stack.folder / "starting.lock", timeout=0):
            if control.runs(stack):
                console.print("The stack is already running; `make stack-stop` stops it.")
                return status(stack, console)
            _wait_for_ports(stack)
            with console.status("starting PostgreSQL, Prefect and MLflow"):
                _bring_up(stack)
    except filelock.Timeout:
        raise StackError("another `make stack` is already starting it") from None
    return status(stack, console)


def stop(stack: Settings, console: Console) -> int:
    """Stop the stack; its data stays."""
    if not control.runs(stack):
        console.print("The stack is not running.")
        return 0
    with console.status("stopping"):
        control.stop(stack)
    console.print(f"Stopped. Its data stays in {stack.folder}")
    return 0


def status(stack: Settings, console: Console) -> int:
    """Show the programs; 0 if every program runs and both servers answer."""
    if not control.runs(stack):
        console.print("The stack is not running; `make stack` starts it.")
        return 1
    addresses = {
        "postgres": f"127.0.0.1:{stack.postgres_port}",
        "prefect": stack.prefect,
        "mlflow": stack.mlflow,
        "worker": f"work pool {stack.pool}",
    }
    table = Table(box=None, pad_edge=False)
    for heading in ("program", "state", "for", "process", "where"):
        table.add_column(heading, overflow="fold")
    well = True
    for each in control.status(stack):
        deaf = each.name in _health(stack) and not server.answers(_health(stack)[each.name])
        state = "does not answer" if deaf and each.state == "running" else each.state
        well &= state == "running"
        running = each.state == "running"
        table.add_row(
            each.name,
            state,
            str(timedelta(seconds=each.seconds)) if running else "",
            str(each.pid) if running else "",
            addresses[each.name],
        )
    console.print(table)
    console.print(f"\nlogs: {_short(stack.folder / 'logs', stack)}", markup=False)
    env = _short(_env_file(stack), stack)
    console.print(f"to use it, in a shell:  . {env}", markup=False)
    console.print("Prefect's page asks for PREFECT_API_AUTH_STRING, which that file sets")
    return 0 if well else 1


def _bring_up(stack: Settings) -> None:
    postgres.prepare(stack)
    control.launch(stack)
    try:
        control.start(stack, "postgres")
        # It may fail at first: processes of a killed server keep its shared memory for a moment.
        postgres.make_databases(stack, lambda: control.check(stack, "postgres", again=True))
        for name in ("prefect", "mlflow"):
            control.start(stack, name)
        for name, address in _health(stack).items():
            _wait(stack, name, address)
        _check_login(stack)
        _register(stack)
        control.start(stack, "worker")
        _write_env_file(stack)
        time.sleep(3)  # supervisord counts a program as running after two seconds
        control.check(stack, "worker")
    except BaseException:
        control.stop(stack)
        raise


def _health(stack: Settings) -> dict[str, str]:
    return {
        "prefect": f"http://{stack.here}:{stack.prefect_port}/api/health",
        "mlflow": f"http://{stack.here}:{stack.mlflow_port}/health",
    }


def _wait(stack: Settings, name: str, address: str) -> None:
    deadline = time.monotonic() + STARTUP_SECONDS
    while not server.answers(address):
        control.check(stack, name)
        if time.monotonic() > deadline:
            raise StackError(f"{name} does not answer; see {programs.log(stack, name)}")
        time.sleep(0.5)


def _wait_for_ports(stack: Settings) -> None:
    """Refuse a port that another program uses; wait for those of our own killed stack."""
    ours = (stack.folder / "supervisord.pid").exists()
    deadline = time.monotonic() + (LAST_RITES if ours else 0)
    for key in ("STACK_POSTGRES_PORT", "STACK_PREFECT_PORT", "STACK_MLFLOW_PORT"):
        port = int(getattr(stack, key.removeprefix("STACK_").lower()))
        while server.taken(port):
            if time.monotonic() > deadline:
                raise StackError(
                    f"port {port} is taken by another program: stop it, or change {key} in "
                    f"{settings.FILE} (`make ui` uses 4200 and 5000 while it runs)"
                )
            time.sleep(0.5)


def _check_login(stack: Settings) -> None:
    """Check that MLflow accepts the password: it keeps the one it was first started with."""
    if not stack.password:
        return
    address = f"http://{stack.here}:{stack.mlflow_port}/api/2.0/mlflow/users/get?username={USER}"
    login = base64.b64encode(f"{USER}:{stack.password}".encode()).decode()
    request = urllib.request.Request(address, headers={"Authorization": f"Basic {login}"})
    try:
        with urllib.request.urlopen(request, timeout=30):
            return
    except urllib.error.HTTPError as error:
        raise StackError(
            f"MLflow refuses STACK_PASSWORD ({error}): it keeps the one it was first started "
            "with, until you change that on MLflow's page"
        ) from None


def _register(stack: Settings) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flows.stack.register"],
        cwd=stack.root,
        env={**programs.environment(stack), **stack.clients()},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise StackError(f"Prefect refused infra/automations.yaml:\n{done.stderr.strip()}")


def _env_file(stack: Settings) -> Path:
    return stack.folder / "env"


def _write_env_file(stack: Settings) -> None:
    lines = ["# To use the stack, source this file in a shell.  It holds logins."]
    lines += [f"export {key}={shlex.quote(value)}" for key, value in stack.clients().items()]
    settings.private(_env_file(stack), "\n".join([*lines, ""]))


def _short(path: Path, stack: Settings) -> Path:
    return path.relative_to(stack.root) if path.is_relative_to(stack.root) else path


if __name__ == "__main__":
    sys.exit(main())
