"""The folder that all stages work in: where their results are stored, and checks before a run.

Nothing here needs PyTorch, so that the flow can run the checks too.
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
    """The folder of a stage, artifacts/<stage>[/<name>]; created if missing."""
    path = ROOT / run_name
    path.mkdir(parents=True, exist_ok=True)
    return path


def check_root() -> None:
    """Refuse to run outside of the project's root.

    Raises:
        ConfigError: there is no params.yaml here.
    """
    if not Path("params.yaml").exists():
        raise ConfigError(f"no params.yaml is in {Path.cwd()}: run from the project's root")


def check_writable(run_name: str) -> None:
    """Check before any work that its results can be written.

    Args:
        run_name: The stage's; empty to check only the folders that all stages share.

    Raises:
        OSError: names a folder that cannot be created or written to.
    """
    CHECKPOINTS.parent.mkdir(exist_ok=True)
    for path in (folder(run_name), folder("runs"), CHECKPOINTS.parent):
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "cannot be written to", str(path))


def check_foreign(experiment: Mapping[str, Any]) -> None:
    """Refuse folders of no key in params.yaml: a later stage would take them for its own.

    Args:
        experiment: The content of params.yaml, by its top-level keys.

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
