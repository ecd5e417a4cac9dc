"""Folders that cannot be written to are found before any work, and named in one line."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from kd import STAGES
from tests.test_pipeline import PROJECT, experiment

NOBODY = 65534
AS_NOBODY = f"import os, sys; os.getuid() or os.setuid({NOBODY}); sys.exit(main())"
LOADED = "from kd import artifacts, params, tracking; params.load(); "
"""What nobody could not import where Python lies in a folder of root's."""
STAGE = f"{LOADED}from kd.__main__ import main; {AS_NOBODY}"
FLOW = f"from flows.pipeline import main; {AS_NOBODY}"
UNIT = f"{LOADED}from kd.compare.__main__ import main; {AS_NOBODY}"


def said_by(folder: Path, code: str, *arguments: str) -> list[str]:
    """The lines of a command that fails; root, who may write everywhere, runs it as nobody."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(PROJECT), "HOME": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr[-1500:]
    return done.stderr.splitlines()


@pytest.mark.parametrize("name", ["artifacts", "artifacts/data", "artifacts/runs", ".kd"])
def test_a_stage_names_the_folder_before_it_works(tmp_path, name):
    experiment(tmp_path)
    for each in ("artifacts/data", "artifacts/runs", ".kd"):
        (tmp_path / each).mkdir(parents=True, exist_ok=True)
        (tmp_path / each).chmod(0o777)
    if name == "artifacts":
        (tmp_path / "artifacts/data").rmdir()
    (tmp_path / name).chmod(0o555)
    tmp_path.chmod(0o755)
    (line,) = said_by(tmp_path, STAGE, "data")
    assert line.startswith("error: [Errno 13] ")
    assert f"'{name}" in line
    assert line.endswith("change its owner or mode, and run it again")


@pytest.fixture
def reachable():
    """A folder that is not below pytest's own, which nobody may enter."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def test_a_flow_names_the_folder(reachable):
    pytest.importorskip("dvc", reason="of the extra pipeline")
    (reachable / "dvc.yaml").touch()
    reachable.chmod(0o555)
    (line,) = said_by(reachable, FLOW)
    assert line.startswith("error: [Errno 13] Permission denied: ")
    assert "/.kd'" in line


@pytest.mark.parametrize("name", ["artifacts", "artifacts/teacher"])
def test_a_flow_names_a_folder_of_artifacts_before_dvc_tries_to_empty_it(reachable, name):
    pytest.importorskip("dvc", reason="of the extra pipeline")
    experiment(reachable)
    stages = {stage: {"cmd": f"touch {stage}", "outs": [stage]} for stage in STAGES}
    (reachable / "dvc.yaml").write_text(json.dumps({"stages": stages}))
    subprocess.run(["git", "init", "-q"], cwd=reachable, check=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=reachable, check=True)
    (reachable / "artifacts/teacher").mkdir(parents=True)
    (reachable / "artifacts/runs").mkdir()
    for each in (reachable, *reachable.rglob("*")):
        each.chmod(0o777)
    (reachable / name).chmod(0o555)
    (line,) = said_by(reachable, FLOW)
    assert line.startswith(f"error: [Errno 13] cannot be written to: '{name}': ")
    assert not (reachable / "data").exists()


def test_a_comparison_names_the_folder(reachable):
    experiment(reachable)
    about = {"name": "tiny", "base": "params.yaml", "reference": "labels"}
    comparison = {"compare": about, "cells": {"labels": {"teachers": "none"}}}
    (reachable / "params.compare.yaml").write_text(json.dumps(comparison))
    (reachable / ".kd").mkdir(mode=0o555)
    reachable.chmod(0o755)
    (line,) = said_by(reachable, UNIT, "params.compare.yaml", "--unit", "seed-0/data")
    assert line.startswith("error: [Errno 13] Permission denied: ")
    assert line.endswith("/.kd/compare': change its owner or mode, and run it again")
