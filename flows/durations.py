"""Estimates how long each stage will take, so that the longest can run first."""

import json
import math
from collections.abc import Iterable
from pathlib import Path

from flows.graph import Stage


def expected(root: Path, stages: Iterable[Stage]) -> dict[str, float]:
    """Seconds by stage, as measured on its last run; see `_guess` for a stage that never ran.

    Every stage records its time in artifacts/runs, which DVC shares between machines.
    """
    stages = tuple(stages)
    known = {each.name: took for each in stages if (took := _last(root, each.name)) is not None}
    return {each.name: known.get(each.name, _guess(each, known)) for each in stages}


def _last(root: Path, name: str) -> float | None:
    path = root / "artifacts" / "runs" / f"{name.replace('@', '/')}.json"
    try:
        return float(json.loads(path.read_text())["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _guess(stage: Stage, known: dict[str, float]) -> float:
    """The longest time of its family (`assistants@...`); if none is known, infinity for a stage
    that uses a GPU, else 0.
    """
    family = stage.name.partition("@")[0]
    related = [took for name, took in known.items() if name.partition("@")[0] == family]
    return max(related, default=math.inf if stage.gpu else 0.0)
