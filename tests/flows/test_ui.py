"""`python -m flows.ui`; test_stack.py shows the pages of a stack with it."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.flows.toys import SOURCES


@pytest.mark.parametrize("name", ["Prefect", "MLflow"])
def test_another_programs_pages_are_not_taken_for_ours(name: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code = (
            "import sys; from flows import ui; "
            f"ui.PAGES[{name!r}] = 'http://127.0.0.1:{port}'; sys.exit(ui.main())"
        )
        env = {**os.environ, "PYTHONPATH": str(SOURCES)}
        for pages in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):  # a server is shown, not started
            env.pop(pages, None)
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {name} needs port {port}, which another program uses")
    assert not list(tmp_path.rglob("*.log"))  # nothing was started
