"""Prefect on SQLite and on PostgreSQL, several flows at once: `python benchmarks/servers.py`.

Each flow is a process of its own, as `python -m flows.pipeline` is, and its tasks do nothing but
log, so that the server's database is what is measured: "database is locked" in the server's log,
flows that did not complete, and seconds a flow.  Servers take turns, so that what else the machine
does hits both.  Prints a Markdown table.
"""

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from flows import child, server
from flows.stack import postgres, settings

SOURCES = Path(__file__).parents[1]
FLOW = """
import sys, time
from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.futures import wait

@task(cache_policy=NO_CACHE, persist_result=False)
def work(lines):
    for number in range(lines):
        get_run_logger().info("line %d", number)

@flow(persist_result=False)
def load(tasks, lines):
    wait([work.submit(lines) for _ in range(tasks)])

started = time.monotonic()
state = load(int(sys.argv[1]), int(sys.argv[2]), return_state=True)
print(time.monotonic() - started)
sys.exit(not state.is_completed())
"""
LOCKED = "database is locked"


@dataclass
class Seen:
    """Of one kind of server."""

    seconds: list[float] = field(default_factory=list)
    failed: int = 0
    locked: list[int] = field(default_factory=list)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--flows", type=int, nargs="+", default=[1, 8], help="at once")
    parser.add_argument("--tasks", type=int, default=60, help="of each flow")
    parser.add_argument("--lines", type=int, default=5, help="that each task logs")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    print(
        f"Prefect {version('prefect')}, PostgreSQL {_postgres_version()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, load {os.getloadavg()[0]:.1f} at the start; "
        f"flows of {given.tasks} tasks with {given.lines} log lines each, "
        f"n = {given.rounds} rounds\n"
    )
    print(f'| flows at once | database | s a flow: median (range) | "{LOCKED}" a round | failed |')
    print("| ---: | --- | ---: | ---: | ---: |", flush=True)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/tmp", prefix="kd-")))
        folder.chmod(0o755)  # PostgreSQL's own user enters it, where root measures
        servers = {
            "SQLite": stack.enter_context(prefect(folder / "sqlite", None)),
            "PostgreSQL": stack.enter_context(prefect(folder / "pg", database(folder, stack))),
        }
        for api, _ in servers.values():
            load(api, 1, given.tasks, given.lines, Seen())  # warm
        for flows in given.flows:
            seen = {name: Seen() for name in servers}
            for _ in range(given.rounds):
                for name, (api, log) in servers.items():
                    before = log.read_text().count(LOCKED)
                    load(api, flows, given.tasks, given.lines, seen[name])
                    seen[name].locked.append(log.read_text().count(LOCKED) - before)
            for name, each in seen.items():
                times = f"{statistics.median(each.seconds):.1f}"
                times += f" ({min(each.seconds):.1f}-{max(each.seconds):.1f})"
                locked = ", ".join(map(str, each.locked))
                failed = f"{each.failed} of {flows * given.rounds}"
                print(f"| {flows} | {name} | {times} | {locked} | {failed} |", flush=True)


def load(api: str, flows: int, tasks: int, lines: int, seen: Seen) -> None:
    """Run that many flows at once."""
    env = {**os.environ, "PREFECT_API_URL": api, "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "50"}
    command = [sys.executable, "-c", FLOW, str(tasks), str(lines)]
    running = [
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(flows)
    ]
    for process in running:
        said, _ = process.communicate()
        seen.failed += process.returncode != 0
        if said:
            seen.seconds.append(float(said.split()[-1]))


@contextmanager
def prefect(home: Path, url: str | None) -> Iterator[tuple[str, Path]]:
    """A server with a fresh database; its address and its log."""
    home.mkdir()
    for key in [each for each in os.environ if each.startswith("PREFECT_")]:
        del os.environ[key]
    os.environ["PREFECT_HOME"] = str(home)
    if url:
        os.environ["PREFECT_API_DATABASE_CONNECTION_URL"] = url
    # What we count; Prefect keeps it to itself otherwise, since its clients try again.
    os.environ["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "ERROR"
    os.environ["PREFECT_SERVER_LOG_RETRYABLE_ERRORS"] = "true"
    server.configure(home)
    own = server.Server(home)
    try:
        own.wait()
        yield own.api, own.log
    finally:
        child.end(own.process)


def database(folder: Path, stack: ExitStack) -> str:
    """A PostgreSQL as `make stack` has it."""
    shutil.copytree(SOURCES / "infra", folder / "infra")
    os.environ |= {"STACK_FOLDER": "stack", "STACK_POSTGRES_PORT": str(server.free_port())}
    ours = settings.read(folder)
    ours.folder.mkdir()
    postgres.prepare(ours)
    with (folder / "postgres.log").open("w") as log:
        process = child.start(
            postgres.command(ours), cwd=Path("/"), env=dict(os.environ), output=log
        )
    stack.callback(child.end, process)
    postgres.make_databases(ours, lambda: None)
    return postgres.url(ours, "prefect", "postgresql+asyncpg")


def _postgres_version() -> str:
    said = subprocess.run(
        [postgres.program("postgres"), "--version"], capture_output=True, text=True, check=True
    )
    return said.stdout.split()[2]


if __name__ == "__main__":
    main()
