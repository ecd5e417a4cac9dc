"""Small pipelines in repositories of their own, run by the real DVC and the real Prefect."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SOURCES = Path(__file__).parents[2]
PYTHON = [sys.executable]
DVC = [sys.executable, "-m", "dvc"]


FOREIGN_WARNINGS = pytest.mark.filterwarnings(
    "ignore:_NoneStep.value will soon raise:DeprecationWarning:dvc",  # DVC 3.67 with pygtrie 2.6
)


class Toy:
    """A git repository with DVC in it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, stages: dict[str, Any], **params: Any) -> None:
        """dvc.yaml and params.yaml; JSON is YAML."""
        self.path("params.yaml").write_text(json.dumps({"unused": 0, **params}))
        self.path("dvc.yaml").write_text(json.dumps({"stages": stages}))

    def path(self, name: str) -> Path:
        return self.root / name

    def dvc(self, *arguments: str) -> str:
        own = Path(sys.executable).parent  # the stages' `python`, even where it is not activated
        return subprocess.run(
            [*DVC, *arguments],
            cwd=self.root,
            env={**os.environ, "PATH": f"{own}:{os.environ['PATH']}"},
            check=True,
            text=True,
            capture_output=True,
        ).stdout

    def status(self) -> dict[str, Any]:
        return dict(json.loads(self.dvc("status", "--json")))

    def start(self, *arguments: str, **env: str) -> subprocess.Popen[str]:
        """`python -m flows.pipeline` as a user's process."""
        return subprocess.Popen(
            [*PYTHON, "-m", "flows.pipeline", *arguments],
            cwd=self.root,
            env={**os.environ, "PYTHONPATH": str(SOURCES), "KD_WARM": "0", **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def times(self, stage: str) -> tuple[float, float]:
        """When a `timed` stage started and ended."""
        start, end = self.path(f"{stage}.txt").read_text().split()
        return float(start), float(end)


def make(template: Path, root: Path) -> Toy:
    shutil.copytree(template, root)
    return Toy(root)


def timed(name: str, seconds: float, **more: Any) -> dict[str, Any]:
    """A stage that writes when it started and ended."""
    command = f"S=$(date +%s.%N); sleep {seconds}; echo $S $(date +%s.%N) > {name}.txt"
    return {"cmd": command, "outs": [f"{name}.txt"], **more}


def endless(name: str, **more: Any) -> dict[str, Any]:
    """A stage that writes its process id and trains until it is killed.

    DVC -> shell -> python: the process that must not be left behind is a grandchild.
    """
    code = "import os, time; open('PID', 'w').write(str(os.getpid())); time.sleep(600)"
    return {"cmd": f'python -c "{code}"; true', "outs": [f"{name}.txt"], **more}


def wait_until(holds: Callable[[], Any], patience: float = 180) -> Any:
    """What `holds` returns, once it is true."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if found := holds():
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {patience} s")


def lives(pid: int) -> bool:
    """Whether the process is there and not a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # it may go between open and read
        return False
    return state != "Z"


def pid_in(path: Path) -> int:
    return int(wait_until(lambda: path.exists() and path.read_text()))
