"""Folders that cannot be written to are found before any work, and named in one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_pipeline import PROJECT, experiment

NOBODY = 65534
AS_NOBODY = f"import os, sys; os.getuid() or os.setuid({NOBODY}); sys.exit(main())"
LOADED = "from kd import artifacts, params, tracking; params.load(); "
"""What nobody could not import where Python lies in a folder of root's."""
STAGE = f"{LOADED}from kd.__main__ import main; {AS_NOBODY}"
FLOW = f"from flows.pipeline import main; {AS_NOBODY}"


def said_by(folder: Path, code: str, *arguments: str) -> list[str]:
    """The lines of a command that fails; root, who may write everywhere, runs it as nobody."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
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


def test_a_flow_names_the_folder(tmp_path):
    tmp_path.chmod(0o555)
    (line,) = said_by(tmp_path, FLOW)
    assert line.startswith("error: [Errno 13] Permission denied: ")
    assert "/.kd'" in line
