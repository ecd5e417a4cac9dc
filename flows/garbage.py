"""What nothing needs any more: in DVC's cache, in MLflow, among checkpoints, and of processes.

Each function says what would go; deleting is another call.  Both work under the workspace's lock.
"""

import os
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flows.stage import DVC, environment
from kd import warm
from kd.tracking import recorder

Keep = Literal["commits", "branches"]
KEPT: dict[Keep, tuple[str, ...]] = {
    "commits": ("--all-commits", "--all-experiments"),
    "branches": ("--workspace", "--all-branches", "--all-tags", "--all-experiments"),
}
"""What DVC counts as needed, beside what lies in the workspace."""
WORDS = "Removing "
"""How a line of `dvc gc --dry` begins that names a file."""
PASSING = ("checkpoints", "targets")
"""Folders under .kd whose files can be made again, and are used while a stage trains."""


class GarbageError(Exception):
    """DVC or MLflow could not say or delete what is unused."""


@dataclass(frozen=True)
class Item:
    """Something that can go."""

    name: str
    size: int
    """Bytes."""


def unused_in_dvc(root: Path, keep: Keep) -> list[Item]:
    """Files of DVC's cache that no commit (or branch, or tag) and not the workspace names."""
    lines = _gc(root, keep, "--dry").splitlines()
    paths = [Path(line.removeprefix(WORDS)) for line in lines if line.startswith(WORDS)]
    return [Item(f"{each.parent.name}{each.name}", each.stat().st_size) for each in paths]


def empty_dvc(root: Path, keep: Keep) -> None:
    """Delete them."""
    _gc(root, keep)


def old_checkpoints(root: Path, days: float) -> list[Path]:
    """Checkpoints and cached targets that nobody wrote or read for so many days."""
    before = time.time() - days * 86_400
    return [
        path
        for path in _passing(root / ".kd")
        if max(path.stat().st_mtime, path.stat().st_atime) < before
    ]


def old_recorders(days: float) -> list[Path]:
    """Locks, logs and dead sockets of this user's recorders that no stage asked for so many days.

    They are named by a digest, which a change of the code or the environment changes, too.
    """
    before = time.time() - days * 86_400
    return [
        path
        for lock in sorted(recorder.folder().glob("*.lock"))  # each stage opens it to write
        if lock.stat().st_mtime < before and not recorder.listens(lock.with_suffix(".sock"))
        for path in (lock.with_suffix(".log"), lock.with_suffix(".sock"), lock)
        if path.exists()
    ]


def old_warm_folders(days: float) -> list[Path]:
    """This user's folders for a warm process's socket, so old, that a killed flow left behind."""
    before = time.time() - days * 86_400
    return [
        folder
        for folder in sorted(Path(tempfile.gettempdir()).glob(f"{warm.FOLDER}*"))
        if _is_own_folder(found := folder.lstat())
        and found.st_mtime < before
        and not any(recorder.listens(path) for path in folder.iterdir())
    ]


def _is_own_folder(found: os.stat_result) -> bool:
    """Whether it is no link, and no other user's."""
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()


def _passing(own: Path) -> Iterator[Path]:
    """The files of checkpoints and targets, those of comparisons included."""
    for name in PASSING:
        for folder in (own / name, *own.glob(f"**/.kd/{name}")):
            yield from (path for path in sorted(folder.rglob("*")) if path.is_file())


def _gc(root: Path, keep: Keep, *words: str) -> str:
    command = [*DVC, "gc", "--force", *KEPT[keep], *words]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment())
    if done.returncode:
        raise GarbageError(f"`dvc gc` failed: {done.stderr.strip()[-1000:]}")
    return done.stdout
