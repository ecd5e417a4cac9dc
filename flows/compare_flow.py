"""The Prefect part of a comparison; see flows/compare.py."""

import subprocess
import threading
from pathlib import Path

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture, wait

from flows.compare import COMMAND, do, left


@task(task_run_name="{unit}", cache_policy=NO_CACHE, persist_result=False)
def run_unit(file: str, root: Path, unit: str, stop: threading.Event) -> None:
    """Run one unit once a slot is free."""
    do(file, root, unit, stop)


@flow(name="compare", persist_result=False)
def compare(file: str = "params.compare.yaml", root: str = ".") -> str:
    """Run what is left of a comparison and return its results table, also as an artifact.

    Args:
        file: The comparison file.
        root: The folder that contains it.
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
    report = subprocess.run(
        [*COMMAND, file], cwd=folder, capture_output=True, text=True, check=True
    )
    create_markdown_artifact(report.stdout, "comparison", f"The table of {file}")
    return report.stdout
