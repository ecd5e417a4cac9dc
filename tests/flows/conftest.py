import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows import child, server
from tests.flows import toys


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("template")
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    for each in ("user.name", "user.email"):  # `dvc exp save` commits; a bare machine has neither
        subprocess.run(["git", "config", each, "t@example.invalid"], cwd=root, check=True)
    subprocess.run([*toys.DVC, "init", "-q"], cwd=root, check=True)
    (root / ".gitignore").write_text(".kd\n")
    return root


@pytest.fixture
def toy(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> toys.Toy:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # slots of its own, too
    monkeypatch.setenv("KD_CPUS", "8")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return toys.make(template, tmp_path / "toy")


@pytest.fixture(scope="session")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One server for all tests, on a fresh database: this is the cold start."""
    # It reads its settings then; later tests would start servers of their own, in $HOME.
    assert "prefect" not in sys.modules, "a test imported Prefect before its settings were made"
    before = os.environ.copy()
    root = tmp_path_factory.mktemp("prefect")
    server.configure(root)
    own = server.Server(root)
    own.wait()
    yield own.api
    child.end(own.process)
    os.environ.clear()
    os.environ.update(before)
