"""How long each stage will probably take, so that the longest can go first."""

import json
import math
from collections.abc import Iterable
from pathlib import Path

from flows.graph import Stage


def expected(root: Path, stages: Iterable[Stage]) -> dict[str, float]:
    """Seconds by stage, as its last run took; see `_guess` for a stage that never ran.

    Every stage notes them in artifacts/runs, which DVC carries from machine to machine.
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
    """As long as the longest of its family (`assistants@...`); otherwise what a GPU helps is
    expected to be longer than anything else.
    """
    family = stage.name.partition("@")[0]
    related = [took for name, took in known.items() if name.partition("@")[0] == family]
    return max(related, default=math.inf if stage.gpu else 0.0)
