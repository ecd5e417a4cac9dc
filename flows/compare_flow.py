"""The Prefect flow of a comparison: each remaining unit is a task, run in its own process.

On the command line use `python -m kd.compare`, which does the same work without Prefect.
"""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture, wait

from flows import child, locks, results

COMMAND = (sys.executable, "-m", "kd.compare")


class UnitFailedError(Exception):
    """A unit of the comparison failed; the message ends with its last output lines."""


@task(task_run_name="{unit}", cache_policy=NO_CACHE, persist_result=False)
def run_unit(file: str, root: Path, unit: str, stop: threading.Event) -> None:
    """Wait for a slot and run one unit on it."""
    lines: list[str] = []
    with locks.slots().take(threads=1, gpu=True, stop=stop) as slot:
        code = child.run(
            [*COMMAND, file, "--unit", unit],
            cwd=root,
            env={**os.environ, **slot.env},
            hear=lines.append,
            stop=stop,
            hold=slot.descriptors,
        )
    if code:
        raise UnitFailedError("\n".join([f"{unit} ended with exit code {code}", *lines[-15:]]))


@flow(name="compare", persist_result=False)
def compare(file: str = "params.compare.yaml", root: str = ".") -> str:
    """Run what is left of a comparison and return its results table, also as an artifact.

    Args:
        file: The comparison file.
        root: The folder that contains it.

    Raises:
        ValueError: `root` is no folder, or the file no valid comparison; the message says why.
        UnitFailedError: a unit failed; all that do not depend on it were run.
    """
    folder, stop = Path(root).resolve(), threading.Event()
    futures: dict[str, PrefectFuture[None]] = {}
    try:
        for unit, needs in left(file, folder).items():
            above = [futures[each] for each in needs if each in futures]
            futures[unit] = run_unit.submit(
                file, folder, unit, stop, return_state=False, wait_for=above
            )
        wait(list(futures.values()))
    except BaseException:
        stop.set()
        raise
    for future in futures.values():
        future.result()
    table = kd_compare(file, folder)
    results.attach(table, key="comparison", description=f"The table of {file}")
    return table


def left(file: str, root: Path) -> dict[str, list[str]]:
    """The remaining units in topological order, each with the units it depends on.

    Raises:
        ValueError: as `compare`.
    """
    if not root.is_dir():
        raise ValueError(f"root is {root}, which is no folder; give the one that contains {file}")
    found: dict[str, list[str]] = json.loads(kd_compare(file, root, "--list"))
    return found


def kd_compare(file: str, root: Path, *options: str) -> str:
    """What `python -m kd.compare` prints; raises its error as a ValueError."""
    command = [*COMMAND, file, *options]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(done.stderr.strip())
    return done.stdout
