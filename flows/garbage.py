"""Finds what is no longer needed: DVC cache files, checkpoints, leftovers of processes.

Listing and deleting are separate calls; hold the workspace's lock for both.
"""

import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flows.stage import DVC, environment
from kd.tracking import contact

Keep = Literal["commits", "branches"]
KEPT: dict[Keep, tuple[str, ...]] = {
    "commits": ("--all-commits", "--all-experiments"),
    "branches": ("--workspace", "--all-branches", "--all-tags", "--all-experiments"),
}
"""`dvc gc` flags that say what to keep, in addition to the workspace."""
WORDS = "Removing "
"""The prefix of lines that name a file in the output of `dvc gc --dry`."""
PASSING = ("checkpoints", "targets")
"""Folders under .kd whose files can be recreated and are used while a stage trains."""


class GarbageError(Exception):
    """DVC could not list or delete what is unused."""


@dataclass(frozen=True)
class Item:
    """Something that can be deleted."""

    name: str
    size: int
    """Bytes."""


def unused_in_dvc(root: Path, keep: Keep) -> list[Item]:
    """DVC cache files referenced neither by the workspace nor by a commit (or branch or tag)."""
    lines = _gc(root, keep, "--dry").splitlines()
    paths = [Path(line.removeprefix(WORDS)) for line in lines if line.startswith(WORDS)]
    return [Item(f"{each.parent.name}{each.name}", each.stat().st_size) for each in paths]


def empty_dvc(root: Path, keep: Keep) -> None:
    """Delete the files that `unused_in_dvc` lists."""
    _gc(root, keep)


def old_checkpoints(root: Path, days: float) -> list[Path]:
    """Checkpoints and cached targets not read or written for `days` days."""
    before = time.time() - days * 86_400
    return [
        path
        for path in _passing(root / ".kd")
        if max(path.stat().st_mtime, path.stat().st_atime) < before
    ]


def old_recorders(days: float) -> list[Path]:
    """Locks, logs and dead sockets of this user's recorders that no stage used for `days` days.

    They are named by a digest that changes with the code and the environment, so they pile up.
    """
    before = time.time() - days * 86_400
    return [
        path
        for lock in sorted(contact.folder().glob("*.lock"))  # touched by each stage
        if lock.stat().st_mtime < before and not contact.listens(lock.with_suffix(".sock"))
        for path in (lock.with_suffix(".log"), lock.with_suffix(".sock"), lock)
        if path.exists()
    ]


def _passing(own: Path) -> Iterator[Path]:
    """The files in the folders PASSING, including those of comparisons."""
    for name in PASSING:
        for folder in (own / name, *own.glob(f"**/.kd/{name}")):
            yield from (path for path in sorted(folder.rglob("*")) if path.is_file())


def _gc(root: Path, keep: Keep, *words: str) -> str:
    command = [*DVC, "gc", "--force", *KEPT[keep], *words]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment())
    if done.returncode:
        raise GarbageError(f"`dvc gc` failed: {done.stderr.strip()[-1000:]}")
    return done.stdout
