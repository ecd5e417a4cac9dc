"""Housekeeping: list what is no longer needed, and delete it only on request.

infra/prefect.yaml deploys `flows/housekeeping_flow.py:housekeeping`.
"""

from pathlib import Path
from typing import Annotated

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed
from pydantic import Field

from flows import garbage, locks
from flows.garbage import Item, Keep
from kd import tracking

SHOWN = 50
"""Maximum number of items listed per kind."""


@task(task_run_name="dvc", cache_policy=NO_CACHE, persist_result=False)
def clean_dvc(root: Path, dry_run: bool, keep: Keep) -> list[Item]:
    """Clean DVC's cache of unused files."""
    items = garbage.unused_in_dvc(root, keep)
    if items and not dry_run:
        garbage.empty_dvc(root, keep)
    return items


@task(task_run_name="mlflow", cache_policy=NO_CACHE, persist_result=False)
def clean_mlflow(dry_run: bool, days: float) -> list[Item]:
    """Purge what users deleted in the MLflow UI."""
    uri = tracking.tracking_uri()
    if uri.startswith(("http://", "https://")):
        get_run_logger().info("MLflow runs on a server: run `mlflow gc` where its database is")
        return []
    tracking.prepare_store()
    from kd.tracking.trash import Trash  # imports MLflow

    trash = Trash(uri, days)
    items = [Item(name, size) for name, size in trash.sizes()]
    if items and not dry_run:
        get_run_logger().info(trash.empty())
    return items


@task(task_run_name="checkpoints", cache_policy=NO_CACHE, persist_result=False)
def clean_checkpoints(root: Path, dry_run: bool, days: float) -> list[Item]:
    """Clean up checkpoints and cached targets of abandoned trainings."""
    paths = garbage.old_checkpoints(root, days)
    items = [Item(str(path.relative_to(root)), path.stat().st_size) for path in paths]
    if not dry_run:
        for path in paths:
            path.unlink(missing_ok=True)
    return items


@task(task_run_name="temporary folder", cache_policy=NO_CACHE, persist_result=False)
def clean_temporary(dry_run: bool, days: float) -> list[Item]:
    """Clean up what recorders left behind, even those of deleted clones."""
    files = garbage.old_recorders(days)
    items = [Item(str(path), path.stat().st_size) for path in files]
    if not dry_run:
        for path in files:
            path.unlink(missing_ok=True)
    return items


@flow(name="housekeeping", persist_result=False)
def housekeeping(
    root: str = ".",
    dry_run: bool = True,
    keep: Keep = "commits",
    days: Annotated[float, Field(ge=0)] = 30,
) -> State:
    """List what is no longer needed, and delete it unless `dry_run` is set.

    Args:
        root: The folder that holds dvc.yaml.
        dry_run: Only list, delete nothing.
        keep: What to keep in DVC's cache besides the workspace's files: those of all commits, or
            of branch heads and tags; in both cases those of queued and finished experiments.
        days: Minimum days since something was deleted in MLflow, or a checkpoint or recorder was
            last used.

    Returns:
        Completed, with a message on how much was or would be deleted.

    Raises:
        flows.locks.WorkspaceBusyError: another flow is running in `root`.
    """
    folder = Path(root).resolve()
    with locks.workspace(folder):
        found = {
            "DVC's cache": clean_dvc(folder, dry_run, keep),
            "MLflow": clean_mlflow(dry_run, days),
            "checkpoints": clean_checkpoints(folder, dry_run, days),
            "temporary folder": clean_temporary(dry_run, days),
        }
    verb = "would be deleted" if dry_run else "deleted"
    sums = [
        f"{where}: {len(items)} {verb}, {sum(item.size for item in items):,} bytes"
        for where, items in found.items()
    ]
    for each in sums:
        get_run_logger().info(each)
    create_markdown_artifact("\n".join(table(found)), "housekeeping", "; ".join(sums))
    return Completed(message=f"{'dry run: ' if dry_run else ''}{'; '.join(sums)}")


def table(found: dict[str, list[Item]]) -> list[str]:
    """The largest items of each kind, as a Markdown table."""
    lines = ["| where | what | bytes |", "| --- | --- | ---: |"]
    for where, items in found.items():
        largest = sorted(items, key=lambda item: -item.size)
        lines += [f"| {where} | `{item.name}` | {item.size:,} |" for item in largest[:SHOWN]]
        if len(items) > SHOWN:
            rest = sum(item.size for item in largest[SHOWN:])
            lines.append(f"| {where} | {len(items) - SHOWN} more | {rest:,} |")
    return lines
