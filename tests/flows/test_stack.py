"""`make stack`: refused where it would be unsafe, and the real thing started, used and ended."""

import base64
import configparser
import json
import os
import shlex
import shutil
import signal
import socket
import string
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
import sqlalchemy

from flows import server
from tests.flows.toys import SOURCES, Toy, endless, pid_in, timed, wait_until

psycopg = pytest.importorskip("psycopg", reason="of the extra stack")
pytest.importorskip("supervisor", reason="of the extra stack")

from flows.stack import control, postgres, programs, settings  # noqa: E402
from flows.stack.settings import StackError  # noqa: E402

PASSWORD = "correct.horse-battery"
TRACKED = """
import mlflow, pathlib
with mlflow.start_run(run_name="tracked"):
    mlflow.log_metric("accuracy", 0.5)
    mlflow.log_text("kept", "note.txt")
pathlib.Path("tracked.txt").write_text("done")
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for key in [each for each in os.environ if each.startswith("STACK_")]:
        monkeypatch.delenv(key)
    (tmp_path / "infra").mkdir()
    shutil.copy(SOURCES / "infra" / "stack.env", tmp_path / "infra")
    return tmp_path


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        ({"STACK_HOST": "0.0.0.0"}, "give STACK_PASSWORD in the environment"),
        ({"STACK_HOST": "0.0.0.0", "STACK_PASSWORD": PASSWORD}, "STACK_NAME is needed"),
        ({"STACK_HOST": "everywhere"}, "an IPv4 address of this machine"),
        ({"STACK_PASSWORD": "short"}, "at least twelve characters"),
        ({"STACK_PASSWORD": 'twelve"; rm -rf'}, "at least twelve characters"),
        ({"STACK_PASSWORD": "correct@horse-battery"}, "at least twelve characters"),
        ({"STACK_MLFLOW_PORT": "http"}, "STACK_MLFLOW_PORT is 'http'"),
    ],
)
def test_what_is_unsafe_or_wrong_is_refused(
    project: Path, monkeypatch: pytest.MonkeyPatch, said: dict[str, str], complaint: str
) -> None:
    for key, value in said.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(StackError, match=complaint):
        settings.refuse_open_doors(settings.read(project))


def test_a_misspelt_setting_is_named(project: Path) -> None:
    with (project / settings.FILE).open("a") as file:
        file.write("STACK_PROT=1\n")
    with pytest.raises(StackError, match="STACK_PROT, which nothing reads"):
        settings.read(project)


def test_a_password_means_itself_in_urls_configuration_files_and_shells() -> None:
    password = "".join(c for c in string.printable if settings.PASSWORD.fullmatch(12 * c))
    url = f"postgresql+psycopg://kd:{password}@postgres:5432/mlflow"
    read = configparser.ConfigParser()
    read.read_string(f"[mlflow]\ndatabase_uri = {url}\n")
    for each in (url, read["mlflow"]["database_uri"]):
        parsed = sqlalchemy.make_url(each)
        assert (parsed.username, parsed.password, parsed.host) == ("kd", password, "postgres")
    assert shlex.quote(password) == password


def test_on_this_machine_alone_prefect_needs_a_login_that_only_its_owner_can_read(
    project: Path,
) -> None:
    stack = settings.read(project)
    clients = stack.clients()
    secret = stack.folder / "secrets" / "prefect"
    assert len(secret.read_text()) > 30
    assert (secret.stat().st_mode & 0o777, secret.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert clients == settings.read(project).clients()  # the same after a restart
    assert clients == {
        "PREFECT_API_URL": "http://127.0.0.1:4200/api",
        "PREFECT_API_AUTH_STRING": f"admin:{secret.read_text()}",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:5000",
    }


def test_without_postgresql_the_package_is_named(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = settings.read(project)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("pathlib.Path.glob", lambda self, pattern: iter(()))
    with pytest.raises(StackError, match="install the package postgresql"):
        postgres.prepare(stack)


def test_its_worker_does_one_flow_at_a_time_as_the_clone_bears(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.stack.postgres.program", lambda name: name)  # none need be here
    stack = settings.read(project)
    stack.folder.mkdir(parents=True)
    read = configparser.RawConfigParser()
    read.read(programs.write(stack))
    assert " --pool kd --name stack --limit 1" in read["program:worker"]["command"]


def test_a_folder_whose_name_no_socket_takes_is_refused(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STACK_FOLDER", "x" * 100)
    with pytest.raises(StackError, match="set STACK_FOLDER to a shorter"):
        control.launch(settings.read(project))


class Stack:
    """One in a folder of its own, on ports of its own, for the project in `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        shutil.copytree(SOURCES / "infra", root / "infra")
        # Not pytest's folder, which PostgreSQL's user may not enter when we are root.
        self.folder = Path(tempfile.mkdtemp(prefix="kd-stack-", dir="/tmp"))
        self.folder.chmod(0o755)
        self.env = {"STACK_FOLDER": str(self.folder)}
        for name in ("PREFECT", "MLFLOW", "POSTGRES"):
            with socket.create_server(("127.0.0.1", 0)) as probe:
                self.env[f"STACK_{name}_PORT"] = str(probe.getsockname()[1])

    def __call__(self, command: str, status: int = 0) -> str:
        return self.run(["flows.stack", command], status, **self.env)

    def run(self, module: list[str], status: int = 0, **env: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *module],
            cwd=self.root,
            env={**os.environ, "PYTHONPATH": str(SOURCES), **env},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    @property
    def clients(self) -> dict[str, str]:
        """What its env file exports."""
        words = shlex.split((self.folder / "env").read_text(), comments=True)
        return dict(each.split("=", 1) for each in words if "=" in each)

    def processes(self) -> list[psutil.Process]:
        supervisord = psutil.Process(int((self.folder / "supervisord.pid").read_text()))
        return [supervisord, *supervisord.children(recursive=True)]

    def ask(self, address: str, body: Any = None) -> Any:
        login = self.clients.get("PREFECT_API_AUTH_STRING", "")
        headers = {"Content-Type": "application/json"}
        if login:
            headers["Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(address, data, headers)) as answer:
            return json.load(answer)

    def query(self, database: str, question: str) -> Any:
        password = (self.folder / "secrets" / "postgres").read_text()
        login = f"kd:{password}@127.0.0.1:{self.env['STACK_POSTGRES_PORT']}"
        with psycopg.connect(f"postgresql://{login}/{database}") as connection:
            return connection.execute(question).fetchall()


@pytest.fixture
def stack(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
    for key in [each for each in os.environ if each.startswith(("PREFECT_", "MLFLOW_", "STACK_"))]:
        monkeypatch.delenv(key)
    stack = Stack(toy.root)
    yield stack
    stack("stop")
    shutil.rmtree(stack.folder)


@pytest.mark.slow
def test_the_stack_is_started_used_killed_secured_and_ended(toy: Toy, stack: Stack) -> None:
    toy.write({})  # a project, so that flows.ui works there
    assert "not running" in stack("status", status=1)
    assert "does not answer" not in stack("start")
    assert "already running" in stack("start")
    api = stack.clients["PREFECT_API_URL"]
    pages = stack.run(["flows.ui"], **stack.clients).split()
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(urllib.request.Request(f"{api}/flow_runs/filter", b"{}"))
    assert {api.removesuffix("/api"), stack.clients["MLFLOW_TRACKING_URI"]} <= set(pages)

    # A flow that dies says nothing; that it is marked is looked at in the end.
    toy.write({"train": endless("train")})
    dying = toy.start(**stack.clients)
    pid_in(toy.path("PID"))
    dying.kill()
    died = time.time()
    dying.communicate()
    (toy.root / ".kd" / "flow.run").unlink()  # or the next run here would mark it

    toy.path("tracked.py").write_text(TRACKED)
    command = f"{sys.executable} tracked.py"
    toy.write({"tracked": {"cmd": command, "outs": ["tracked.txt"]}, "one": timed("one", 0)})
    said, _ = (process := toy.start(**stack.clients)).communicate(timeout=300)
    assert process.returncode == 0, said
    assert stack.query("prefect", "SELECT count(*) FROM task_run") == [(3,)]
    assert stack.query("mlflow", "SELECT name, status FROM runs") == [("tracked", "FINISHED")]
    (kept,) = (stack.folder / "artifacts").rglob("note.txt")
    assert kept.read_text() == "kept"
    (workers,) = [stack.ask(f"{api}/work_pools/kd/workers/filter", {})]
    assert [each["name"] for each in workers] == ["stack"]

    def states() -> dict[str, float]:
        """When each came to be."""
        found = [each["state"] for each in stack.ask(f"{api}/flow_runs/filter", {})]
        return {
            each["type"]: datetime.fromisoformat(each["timestamp"]).timestamp() for each in found
        }

    wait_until(lambda: "CRASHED" in states())
    assert states().keys() == {"COMPLETED", "CRASHED"}
    print("marked as dead after", states()["CRASHED"] - died, "s")
    assert states()["CRASHED"] < died + 120

    # Prefect's server falls, and is up again without anybody's doing.
    (prefect,) = [each for each in control.status(_settings(stack)) if each.name == "prefect"]
    for each in psutil.Process(prefect.pid).children(recursive=True):
        each.kill()
    stack("status", status=1)
    wait_until(lambda: server.answers(f"{api}/health"))

    # Supervisord falls: it takes them all along, and a new start finds the ports free.
    processes = stack.processes()
    processes[0].send_signal(signal.SIGKILL)
    # And from other machines nobody comes in without the password.
    stack.env |= {"STACK_HOST": "0.0.0.0", "STACK_NAME": "localhost", "STACK_PASSWORD": PASSWORD}
    stack("start")
    assert not any(each.is_running() for each in processes)
    for address in (f"{api}/flow_runs/filter", f"{stack.clients['MLFLOW_TRACKING_URI']}/ajax-api"):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(urllib.request.Request(address, b"{}"))
    toy.path("tracked.txt").unlink()
    toy.path("one.txt").unlink()
    toy.write({"tracked": {"cmd": f"{command}; true", "outs": ["tracked.txt"]}})
    said, _ = (process := toy.start(**stack.clients)).communicate(timeout=300)
    assert process.returncode == 0, said
    assert stack.query("mlflow", "SELECT count(*) FROM runs") == [(2,)]
    assert states().keys() == {"COMPLETED", "CRASHED"}
    assert stack.query("prefect", "SELECT count(*) FROM flow_run") == [(3,)]

    processes = stack.processes()
    assert "Stopped" in stack("stop")
    assert not any(each.is_running() for each in processes)
    assert "not running" in stack("stop")


def _settings(stack: Stack) -> settings.Settings:
    with pytest.MonkeyPatch.context() as patch:
        for key, value in stack.env.items():
            patch.setenv(key, value)
        return settings.read(stack.root)
