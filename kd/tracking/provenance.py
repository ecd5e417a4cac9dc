"""Where a run comes from: the tags for its process, its user, its commit and its inputs."""

import getpass
import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from kd import git
from kd.build import read_yaml


def tags(root: Path, stage: str, name: str | None, pid: int) -> dict[str, str]:
    """The tags of a stage that process `pid` runs in the repository `root`."""
    return {
        "mlflow.user": _user(),
        **_process_tags(pid),
        **_git_tags(root),
        **_dvc_tags(root, stage, name),
    }


def lives(tags: Mapping[str, str]) -> bool:
    """Whether the process in a run's tags still exists (start times may differ a little)."""
    try:
        born = psutil.Process(int(tags["kd.pid"])).create_time()
    except psutil.NoSuchProcess:
        return False
    return bool(abs(born - float(tags.get("kd.pid_born", 0))) < 5)


def _process_tags(pid: int) -> dict[str, str]:
    """Tags that identify the process; its start time is included because pids are reused."""
    tags = {"kd.host": socket.gethostname(), "kd.pid": str(pid)}
    with suppress(psutil.NoSuchProcess):
        tags["kd.pid_born"] = str(psutil.Process(pid).create_time())
    return tags


def _user() -> str:
    """The user's name, or the number of a user without one, as in containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _git_tags(root: Path) -> dict[str, str]:
    """The commit, and whether files other than dvc.lock (which the pipeline writes) differ."""
    found = git.state(root)
    if found is None:
        return {}
    commit, dirty = found
    return {"git.commit": commit, "git.dirty": str(dirty).lower()}


def _dvc_tags(root: Path, stage: str, name: str | None) -> dict[str, str]:
    """Hashes of the stage's dependencies: dvc.lock has them as outputs of earlier stages."""
    try:
        lock, pipeline = (read_yaml(root / file)["stages"] for file in ("dvc.lock", "dvc.yaml"))
        made = {o["path"]: o["md5"] for made_by in lock.values() for o in made_by.get("outs", ())}
        items = read_yaml(root / "params.yaml").get(stage) if name else None
        deps = [_filled_in(dep, name, items) for dep in _deps(pipeline[stage])]
    except Exception:
        return {}  # no DVC pipeline here, or another stage's DVC is writing dvc.lock
    return {f"dvc.dep.{dep}": read for dep in deps if (read := _read_of(dep, made))}


def _read_of(dep: str, made: Mapping[str, str]) -> str:
    """The hash of a dependency; for a folder filled by several stages, the hash of each output."""
    inside = (
        f"{out[len(dep) + 1 :]} {md5}" for out, md5 in made.items() if out.startswith(f"{dep}/")
    )
    return made.get(dep) or ", ".join(inside)


def _filled_in(dep: str, name: str | None, items: Any) -> str:
    """A dependency of a foreach stage, with the `name` that it runs for and its item's values."""

    def value(found: re.Match[str]) -> str:
        return str(items[name][found[1]] if found[1] else name)

    return re.sub(r"\$\{(?:key|item)(?:\.(\w+))?\}", value, dep)


def _deps(entry: Mapping[str, Any]) -> Iterator[str]:
    """The dependencies of a stage in dvc.yaml (plain or foreach)."""
    for dep in entry.get("do", entry).get("deps", ()):
        yield dep if isinstance(dep, str) else next(iter(dep))
