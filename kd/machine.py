"""This machine: what results depend on, what was measured on it, and which run it did when."""

import platform
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock  # a dependency of PyTorch

from kd import git
from kd.artifacts import ROOT, digest, read_json, write_json

MACHINE = Path(".kd/machine")
"""Measurements on this machine that decide how it trains."""


def machine() -> dict[str, Any]:
    """The software and hardware that results on this machine depend on."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def processor() -> str:
    """The processor's name: on Linux from /proc, since Python rarely knows it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return found[0] if found else platform.processor() or platform.machine()


def remembered(
    topic: str, question: Mapping[str, Any], ask: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The result of a measurement on this machine, cached under .kd.

    Args:
        topic: What is measured; the cache's folder.
        question: Everything that the result depends on, as plain data.
        ask: Measures it; called on a cache miss.
    """
    path = MACHINE / topic / f"{digest(question)[:32]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            write_json(path, {**question, **ask()})
        return read_json(path)


def write_run_record(run_name: str, started: float, run_id: str | None, url: str | None) -> None:
    """Write down what differs between equal runs, and so stays out of artifacts: when and where.

    Args:
        run_name: The stage, and its name if it has one.
        started: Seconds since 1970.
        run_id: The tracking run's; None if there is none.
        url: That run's page.
    """
    commit, dirty = git.state(Path()) or (None, None)
    record = {
        "run_id": run_id,
        "url": url,
        "started": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
        "seconds": round(time.time() - started, 3),
        "commit": commit,
        "dirty": dirty,
        "host": platform.node(),
        "python": platform.python_version(),
        **machine(),
    }
    path = ROOT / "runs" / f"{run_name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
