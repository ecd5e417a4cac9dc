"""The pipeline in dvc.yaml, read through DVC: stages, dependencies, what is stale and why.

There is no second definition of the pipeline.  This process runs no stages itself; they run in
child processes, which can be cancelled (flows/stage.py).
"""

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx
from dvc.dependency.param import ParamsDependency
from dvc.dvcfile import Lockfile
from dvc.repo import Repo
from dvc.stage import PipelineStage
from dvc.stage.cache import _get_cache_hash, _get_stage_hash
from dvc.stage.serialize import to_single_stage_lockfile
from dvc.utils.flatten import flatten

logging.getLogger("dvc").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Stage:
    """One stage of dvc.yaml, with the flow's settings from its `meta`."""

    name: str
    """DVC's name, such as "assistants@large"."""

    waits_for: tuple[str, ...]
    """The stages whose outputs it reads."""

    threads: int = 1
    """CPU threads it keeps busy."""

    gpu: float = 0.0
    """The fraction of a GPU it takes, or a number of whole GPUs; 0 if it does not use one."""

    timeout: float | None = None
    """Seconds it may take; None is no limit."""

    retries: int = 0
    """How many times it is retried after a failure."""


@dataclass(frozen=True)
class Plan:
    """What a run will do."""

    stages: tuple[Stage, ...]
    """Every stage, dependencies first."""

    reasons: dict[str, str]
    """Why each stage of the run is included, in the order of `stages`.  Empty: nothing to do."""

    @property
    def promotes(self) -> bool:
        """Whether there is a student, which competes for champion at the end."""
        return any(stage.name == "student" for stage in self.stages)


def read(root: Path) -> Plan:
    """The plan for the workspace `root`, which is the folder that holds dvc.yaml.

    Raises:
        dvc.exceptions.DvcException: no repository, an invalid dvc.yaml, or a stage is running.
        ValueError: a `meta` has an unknown key or an invalid value.
    """
    with Repo(str(root), _wait_for_lock=True) as repo, repo.lock:
        graph = repo.index.graph  # an edge leads from a stage to one it depends on
        found = [each for each in networkx.dfs_postorder_nodes(graph) if _is_ours(each)]
        stages = tuple(_stage(each, graph.successors(each)) for each in found)
        stale = {each.name: why for each in found if (why := _reason(each))}
    return Plan(stages, dict(_with_downstream(stages, stale)))


def sources(root: Path) -> dict[str, bool]:
    """The .dvc files whose data stages read, and whether each is an import from elsewhere."""
    with Repo(str(root), _wait_for_lock=True) as repo, repo.lock:
        graph = repo.index.graph
        read = [each for each in graph if not _is_ours(each) and graph.in_degree(each)]
        return {str(Path(each.path).relative_to(root)): each.is_import for each in read}


@dataclass(frozen=True)
class Hashes:
    """A stage's inputs and outputs: files by DVC's content hash, params by value."""

    inputs: dict[str, object]
    """In their current state."""

    outputs: dict[str, object]
    """As recorded in dvc.lock by the last run."""


def hashes(root: Path, name: str) -> Hashes:
    """A stage's hashes.

    Takes DVC's lock, because another stage that is just finishing rewrites dvc.lock in place.
    """
    with Repo(str(root), _wait_for_lock=True) as repo, repo.lock:
        stage = _load(repo, root, name)
        outputs = {str(each.def_path): each.hash_info.value for each in stage.outs}
        stage.save_deps(allow_missing=True)
        inputs: dict[str, object] = {}
        for each in stage.deps:
            value = each.hash_info.value
            inputs.update(value if isinstance(value, dict) else {str(each.def_path): value})
        return Hashes(inputs, outputs)


def tracked_inputs(root: Path, names: Iterable[str]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The DVC-tracked inputs of the named stages that none of these stages produces.

    Returns:
        The paths relative to `root`, and the dvc.lock entries of the stages that produce them.
    """
    with Repo(str(root), _wait_for_lock=True) as repo, repo.lock:
        readers = [_load(repo, root, name) for name in names]
        read = [each.fs_path for stage in readers for each in stage.deps]
        made = [each for each in repo.index.outs if each.use_cache and each.stage not in readers]
        found = {
            os.path.relpath(each.fs_path, root): each.stage
            for each in made
            if any(_overlap(each.fs_path, path) for path in read)
        }
        lock = {
            each.name: to_single_stage_lockfile(each, with_files=True)
            for each in found.values()
            if _is_ours(each)
        }
    return tuple(sorted(found)), lock


def _overlap(one: str, other: str) -> bool:
    """Whether the paths are equal or one contains the other."""
    one, other = os.path.join(one, ""), os.path.join(other, "")
    return one.startswith(other) or other.startswith(one)


def disown(root: Path, name: str) -> None:
    """Delete DVC's records of the stage: its entries in dvc.lock and in the run-cache.

    DVC records the inputs as they are when a stage ends.  If they were edited while it ran, both
    entries claim that the edited inputs produced this output, and the run-cache would restore it.
    """
    with Repo(str(root), _wait_for_lock=True) as repo, repo.lock:
        stage = _load(repo, root, name)
        key = _get_stage_hash(stage)
        value = _get_cache_hash(to_single_stage_lockfile(stage))
        entries = Path(repo.stage_cache.cache_dir, key[:2], key)
        (entries / value).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty; an empty one makes DVC fail
            entries.rmdir()
        Lockfile(repo, stage.dvcfile._lockfile.path).remove_stage(stage)


def _load(repo: Repo, root: Path, name: str) -> Any:
    """The stage as it is now in dvc.yaml and dvc.lock, whatever the working directory."""
    return repo.stage.load_one(str(root / "dvc.yaml"), name)


def _is_ours(stage: Any) -> bool:
    """Whether it is a stage of dvc.yaml; to DVC, a .dvc file is a stage too."""
    return isinstance(stage, PipelineStage)


def _stage(stage: Any, upstream: Iterator[Any]) -> Stage:
    meta = dict(stage.meta or {})
    try:
        made = Stage(
            name=stage.name,
            waits_for=tuple(sorted(each.name for each in upstream if _is_ours(each))),
            threads=int(meta.pop("threads", 1)),
            gpu=_gpus(meta.pop("gpu", False)),
            timeout=float(meta.pop("timeout")) if "timeout" in meta else None,
            retries=int(meta.pop("retries", 0)),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"dvc.yaml: meta of {stage.name}: {error}") from error
    if meta:
        raise ValueError(
            f"dvc.yaml: meta of {stage.name} has {', '.join(meta)}; "
            "it may have threads, gpu, timeout and retries"
        )
    return made


def _gpus(wanted: object) -> float:
    if isinstance(wanted, bool | int | float):
        number = float(wanted)
        if 0 <= number <= 1 or (number > 1 and number.is_integer()):
            return number
    raise ValueError(
        f"gpu is {wanted!r}; it may be true, false, a fraction of a GPU (0.5), "
        "or a number of whole GPUs (4)"
    )


def _with_downstream(
    stages: tuple[Stage, ...], stale: dict[str, str]
) -> Iterator[tuple[str, str]]:
    running: set[str] = set()
    for stage in stages:
        above = [each for each in stage.waits_for if each in running]
        if stage.name in stale or above:
            running.add(stage.name)
            yield stage.name, stale.get(stage.name) or f"after {_listed(above)}"


def _reason(stage: Any) -> str | None:
    """Why DVC would run the stage, in a few words; None when it would not."""
    status = stage.status().get(stage.addressing, [])
    if not status:
        return None
    if not any(each.hash_info for each in (*stage.deps, *stage.outs)):
        return "never run"
    edited: list[str] = []  # params: listed first, as changed files often follow from them
    words = ["command changed"] if "changed command" in status else []
    for each in stage.deps:
        if isinstance(each, ParamsDependency):
            edited += _params_changed(each)
        else:
            words += _file("input", each)
    for each in stage.outs:
        words += _file("output", each)
    return _listed(edited + words) or "runs always"


_WORDS = {"modified": "changed", "deleted": "missing", "not in cache": "missing from the cache"}


def _file(role: str, entry: Any) -> list[str]:
    return [
        f"{role} {entry.def_path} {_WORDS.get(what, what)}" for what in entry.status().values()
    ]


def _params_changed(entry: Any) -> list[str]:
    old, new = flatten(entry.hash_info.value or {}), flatten(entry.read_params())
    return [
        f"params {key} {old.get(key, 'absent')} -> {new.get(key, 'absent')}"
        for key in {**old, **new}
        if old.get(key) != new.get(key)
    ]


def _listed(words: list[str]) -> str:
    """Two items joined by "and"; of more, the first and the number of others."""
    if len(words) <= 2:
        return " and ".join(words)
    return f"{words[0]} and {len(words) - 1} more"
