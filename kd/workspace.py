"""The folder that all stages work in: where it keeps what they make, and what it must be for that.

Nothing here takes PyTorch, so that the flow, too, can ask before anything runs.
"""

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd import FAMILIES
from kd.component import ConfigError

ROOT = Path("artifacts")
DATA = ROOT / "data"
CHECKPOINTS = Path(".kd/checkpoints")
"""Outside every stage's folder: DVC empties those before it runs a stage."""


def folder(run_name: str) -> Path:
    """The folder of a stage: artifacts/<stage>[/<name>]; made where it is missing."""
    path = ROOT / run_name
    path.mkdir(parents=True, exist_ok=True)
    return path


def check_root() -> None:
    """Refuse to look for the project's files where it is not.

    Raises:
        ConfigError: no params.yaml is here.
    """
    if not Path("params.yaml").exists():
        raise ConfigError(f"no params.yaml is in {Path.cwd()}: run from the project's root")


def check_writable(run_name: str) -> None:
    """Find out before any work that what it makes can be kept.

    Args:
        run_name: The stage's; empty where only what all stages share is asked about.

    Raises:
        OSError: names a folder that cannot be made or written to.
    """
    CHECKPOINTS.parent.mkdir(exist_ok=True)
    for path in (folder(run_name), folder("runs"), CHECKPOINTS.parent):
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "cannot be written to", str(path))


def check_foreign(experiment: Mapping[str, Any]) -> None:
    """Refuse folders that no key of params.yaml makes: a later stage would take them for its own.

    Args:
        experiment: What params.yaml says, by its top-level keys.

    Raises:
        ConfigError: names the folder; nothing is deleted.
    """
    for family in FAMILIES:
        parent = ROOT / family
        found = {path.parent.name for path in parent.glob("*/*")}
        if foreign := sorted(found - {str(name) for name in experiment[family]}):
            raise ConfigError(
                f"{parent / foreign[0]} belongs to no key of params.yaml's {family}: "
                f"move it away or delete it (what DVC made stays in its cache)"
            )
