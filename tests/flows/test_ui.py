"""`make ui`: the real servers, on ports of their own, and who else could use them."""

import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.flows.toys import SOURCES

START = """
import sys
from flows import ui
ports = sys.argv[1:]
sys.argv[1:] = []
ui.PAGES = {"Prefect": f"http://127.0.0.1:{ports[0]}", "MLflow": f"http://127.0.0.1:{ports[1]}"}
ui.main()
"""
ORDINARY = """
import sys
from prefect.client.orchestration import SyncPrefectClient
with SyncPrefectClient(sys.argv[1]) as client:
    client.create_flow_from_name("ours")
"""


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[tuple[psutil.Process, str]]:
    """The process of `make ui`, and Prefect's address."""
    ports = []
    for _ in range(2):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            ports.append(str(probe.getsockname()[1]))
    (tmp_path / "dvc.yaml").touch()
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_"))}
    env = {
        **kept,
        "PYTHONPATH": str(SOURCES),
        "PYTHONUNBUFFERED": "1",
        "PREFECT_SERVER_API_PORT": ports[0],
        "MLFLOW_PORT": ports[1],
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/secret.db",
    }
    command = [sys.executable, "-c", START, *ports]
    process = subprocess.Popen(command, cwd=tmp_path, env=env, text=True, stdout=subprocess.PIPE)
    assert process.stdout
    for line in process.stdout:
        if "Ctrl-C" in line:
            break
    yield psutil.Process(process.pid), f"http://127.0.0.1:{ports[0]}/api"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)


@pytest.mark.slow
def test_its_servers_keep_passwords_to_themselves_and_heed_no_other_web_page(
    opened: tuple[psutil.Process, str], tmp_path: Path
) -> None:
    process, api = opened
    words = [word for each in process.children(recursive=True) for word in each.cmdline()]
    assert "mlflow" in words
    assert (tmp_path / "secret.db").stat().st_size > 0
    assert not [word for word in words if "secret" in word]

    # What a page sends without asking first: a browser asks before it adds any header.
    blind = urllib.request.Request(f"{api}/flows/", b'{"name": "sent"}', method="POST")
    blind.add_header("Origin", "http://evil.example")
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(blind, timeout=30)
    subprocess.run([sys.executable, "-c", ORDINARY, api], check=True, timeout=120)


@pytest.mark.parametrize("name", ["Prefect", "MLflow"])
def test_another_programs_pages_are_not_taken_for_ours(name: str, tmp_path: Path) -> None:
    (tmp_path / "dvc.yaml").touch()
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


def test_elsewhere_than_in_a_project_it_starts_nothing(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(SOURCES)}
    command = [sys.executable, "-m", "flows.ui"]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr == f"error: no dvc.yaml is in {tmp_path}: run from the project's root\n"
    assert not list(tmp_path.iterdir())
