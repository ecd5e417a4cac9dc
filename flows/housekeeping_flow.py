"""Housekeeping: what nothing needs any more is listed, and deleted only where that is asked for.

infra/prefect.yaml deploys `flows/housekeeping_flow.py:housekeeping`.
"""

import shutil
from pathlib import Path

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows import garbage, locks
from flows.garbage import Item, Keep
from kd import tracking

SHOWN = 50
"""Items of each kind that the list names."""


@task(task_run_name="dvc", cache_policy=NO_CACHE, persist_result=False)
def clean_dvc(root: Path, dry_run: bool, keep: Keep) -> list[Item]:
    """Files in DVC's cache."""
    items = garbage.unused_in_dvc(root, keep)
    if items and not dry_run:
        garbage.empty_dvc(root, keep)
    return items


@task(task_run_name="mlflow", cache_policy=NO_CACHE, persist_result=False)
def clean_mlflow(dry_run: bool, days: float) -> list[Item]:
    """What people deleted in MLflow's pages."""
    uri = tracking.tracking_uri()
    if uri.startswith(("http://", "https://")):
        get_run_logger().info("MLflow is a server's: `mlflow gc` has to run where its database is")
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
    """Checkpoints and cached targets of trainings that nobody goes on with."""
    paths = garbage.old_checkpoints(root, days)
    items = [Item(str(path.relative_to(root)), path.stat().st_size) for path in paths]
    if not dry_run:
        for path in paths:
            path.unlink(missing_ok=True)
    return items


@task(task_run_name="temporary folder", cache_policy=NO_CACHE, persist_result=False)
def clean_temporary(dry_run: bool, days: float) -> list[Item]:
    """What recorders and warm processes left, of clones that are gone, too."""
    files, folders = garbage.old_recorders(days), garbage.old_warm_folders(days)
    items = [Item(str(path), path.stat().st_size) for path in [*files, *folders]]
    if not dry_run:
        for path in files:
            path.unlink(missing_ok=True)
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)  # its flow may end at this moment
    return items


@flow(name="housekeeping", persist_result=False)
def housekeeping(
    root: str = ".", dry_run: bool = True, keep: Keep = "commits", days: float = 30
) -> State:
    """List what nothing needs any more, and delete it where `dry_run` is off.

    Args:
        root: The folder that holds dvc.yaml.
        dry_run: Whether to list only.
        keep: What of DVC's cache is needed beside the workspace's: what any commit names, or the
            heads of branches and tags; queued and finished experiments in either case.
        days: How long ago something was deleted in MLflow, or a checkpoint or recorder last used,
            or a warm process's folder made.

    Returns:
        Completed, saying how much went or would go.

    Raises:
        flows.locks.WorkspaceBusyError: another flow works there.
    """
    folder = Path(root).resolve()
    with locks.workspace(folder):
        found = {
            "DVC's cache": clean_dvc(folder, dry_run, keep),
            "MLflow": clean_mlflow(dry_run, days),
            "checkpoints": clean_checkpoints(folder, dry_run, days),
            "temporary folder": clean_temporary(dry_run, days),
        }
    verb = "would go" if dry_run else "gone"
    sums = [
        f"{where}: {len(items)} {verb}, {sum(item.size for item in items):,} bytes"
        for where, items in found.items()
    ]
    for each in sums:
        get_run_logger().info(each)
    create_markdown_artifact("\n".join(table(found)), "housekeeping", "; ".join(sums))
    return Completed(message=f"{'dry run: ' if dry_run else ''}{'; '.join(sums)}")


def table(found: dict[str, list[Item]]) -> list[str]:
    """The largest of each kind, as Markdown."""
    lines = ["| where | what | bytes |", "| --- | --- | ---: |"]
    for where, items in found.items():
        largest = sorted(items, key=lambda item: -item.size)
        lines += [f"| {where} | `{item.name}` | {item.size:,} |" for item in largest[:SHOWN]]
        if len(items) > SHOWN:
            rest = sum(item.size for item in largest[SHOWN:])
            lines.append(f"| {where} | {len(items) - SHOWN} more | {rest:,} |")
    return lines
