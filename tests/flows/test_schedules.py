"""What runs by itself: a real server in a fresh home, deployments from a clone, a real worker."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows import server
from tests.flows.test_upstream import git
from tests.flows.toys import SOURCES, Toy, wait_until
from tests.test_workspace import clone

pytestmark = pytest.mark.slow

PROGRAMS = Path(sys.executable).parent
SMALL = {
    "recipe.epochs": 2,
    "recipe.checkpoint_steps": 100,
    "baselines": {"labels": {"teachers": "none"}},
    "exports": {"onnx": {"kind": "onnx"}},
}
"""With two assistants, one of each other stage."""


class Stage:
    """A home with a Prefect server and a worker, and a clone that they work in."""

    def __init__(self, tmp: Path) -> None:
        self.tmp, self.root = tmp, tmp / "clone"
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.api = f"http://127.0.0.1:{self.port}/api"
        (tmp / "home").mkdir()
        ours = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
        self.env = {
            **ours,
            "HOME": str(tmp / "home"),
            "PATH": f"{PROGRAMS}:{os.environ['PATH']}",
            "PREFECT_API_URL": self.api,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PYTHONPATH": os.pathsep.join([str(self.root), os.environ.get("PYTHONPATH", "")]),
            "KD_RECORDER_IDLE": "5",
        }
        self.processes: list[subprocess.Popen[bytes]] = []

    def run(self, *command: str) -> str:
        done = subprocess.run(
            command, cwd=self.root, env=self.env, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def start(self, *command: str) -> None:
        with (self.tmp / f"{command[1]}.log").open("wb") as log:
            self.processes.append(
                subprocess.Popen(
                    command,
                    cwd=self.root,
                    env=self.env,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )

    def end(self) -> None:
        for process in reversed(self.processes):
            os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def ask(self, path: str, **body: Any) -> Any:
        request = urllib.request.Request(
            f"{self.api}/{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def runs(self, deployment: str) -> list[dict[str, Any]]:
        """The runs of a deployment that have begun, oldest first."""
        found: list[dict[str, Any]] = self.ask(
            "flow_runs/filter",
            deployments={"name": {"any_": [deployment]}},
            flow_runs={"start_time": {"is_null_": False}},
            sort="START_TIME_ASC",
        )
        return found

    def finished(
        self, deployment: str, count: int, *, by_schedule: bool | None = None
    ) -> list[dict[str, Any]]:
        """Wait until so many runs of it have come to an end; all of them must be good."""

        def ended() -> list[dict[str, Any]]:
            found = [run for run in self.runs(deployment) if run["end_time"]]
            if by_schedule is not None:
                found = [run for run in found if run["auto_scheduled"] == by_schedule]
            assert {run["state_type"] for run in found} <= {"COMPLETED"}, [
                (run["name"], run["state"]["message"]) for run in found
            ]
            return found if len(found) >= count else []

        found: list[dict[str, Any]] = wait_until(ended, patience=600)
        return found

    def every_half_minute(self, deployment: str, count: int) -> list[dict[str, Any]]:
        """Have a schedule start it until so many runs have ended; all that it started."""
        name = f"{deployment}/{deployment}"
        words = ["prefect", "deployment", "schedule"]
        self.run(*words, "create", "--replace", "--accept-yes", "--interval", "30", name)
        self.finished(deployment, count)
        self.run(*words, "clear", "--accept-yes", name)
        # The worker may have taken another one, which begins only now: see that it ends before
        # anything changes upstream.
        under_way = {
            "deployments": {"name": {"any_": [deployment]}},
            "flow_runs": {"state": {"type": {"any_": ["SCHEDULED", "PENDING", "RUNNING"]}}},
        }
        wait_until(lambda: not self.ask("flow_runs/filter", **under_way), patience=600)
        return self.runs(deployment)


def in_order(runs: list[dict[str, Any]]) -> bool:
    """Whether no two overlapped."""
    return all(a["end_time"] <= b["start_time"] for a, b in itertools.pairwise(runs))


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    made = Stage(tmp_path)
    origin = Toy(tmp_path / "origin")
    origin.root.mkdir()
    raw = yaml.safe_load((SOURCES / "params.yaml").read_text())
    assistants = {name: raw["assistants"][name] for name in ("small", "medium")}
    clone(origin.root, tracking=True, assistants=assistants, **SMALL)
    origin.dvc("remote", "add", "-q", "-d", "store", str(tmp_path / "store"))
    git(origin.root, "commit", "-q", "--all", "-m", "a remote")
    git(tmp_path, "clone", "-q", "origin", "clone")
    try:
        yield made
    finally:
        made.end()


def change_upstream(stage: Stage) -> None:
    """A commit upstream that changes the student's temperature."""
    path = stage.tmp / "origin/params.yaml"
    raw = yaml.safe_load(path.read_text())
    raw["student"]["method"]["temperature"] = 1.0
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    git(stage.tmp / "origin", "commit", "-q", "--all", "-m", "another temperature")


MLFLOW = """
import json, sys, warnings
warnings.simplefilter("ignore")
import mlflow
from kd import tracking
uri = tracking.tracking_uri()
mlflow.set_tracking_uri(uri)
client = mlflow.MlflowClient(uri)
model = client.get_registered_model("kd-student")
champion = client.get_model_version_by_alias("kd-student", "champion")
export = mlflow.pyfunc.load_model(champion.tags["kd.export.onnx"])
found = export.predict(mlflow.pyfunc.load_model(champion.source).input_example)
aliases = {alias: str(number) for alias, number in model.aliases.items()}
print(json.dumps({"aliases": aliases, "labels": found["label"].tolist(), "decisions": {
    str(v.version): v.tags.get("kd.decision") for v in client.search_model_versions()}}))
"""


def registry(stage: Stage) -> dict[str, Any]:
    """Aliases and decisions, and what the champion's export answers."""
    found: dict[str, Any] = json.loads(stage.run("python", "-c", MLFLOW).splitlines()[-1])
    assert len(found["labels"]) == 2
    return found


def cached(stage: Stage) -> int:
    return sum(path.is_file() for path in (stage.root / ".dvc/cache/files").rglob("*"))


def test_a_clone_retrains_by_itself_when_something_changed_and_is_kept_in_order(
    stage: Stage,
) -> None:
    stage.start("prefect", "server", "start", "--port", str(stage.port))
    wait_until(lambda: server.answers(f"{stage.api}/health"))
    stage.run("prefect", "work-pool", "create", "--type", "process", "kd")
    said = stage.run(
        "prefect", "--no-prompt", "deploy", "--prefect-file", "infra/prefect.yaml", "--all"
    )
    for name in ("retrain", "compare", "housekeeping"):
        assert f"'{name}/{name}' successfully created" in " ".join(said.split())
    stage.start("prefect", "worker", "start", "--pool", "kd", "--limit", "1")

    # A schedule starts runs: the first has everything to do, the others wait for it, find nothing
    # to do, say so, and leave the registry as it is.
    first, *others = scheduled = stage.every_half_minute("retrain", 2)
    assert all(run["auto_scheduled"] for run in scheduled)
    assert first["state"]["message"].startswith("ran data, teacher")
    assert {run["state"]["message"] for run in others} == {"nothing changed"}
    assert in_order(scheduled)
    before = registry(stage)
    assert before["aliases"] == {"challenger": "1", "champion": "1"}
    assert before["decisions"] == {"1": "champion: the first of its name"}
    assert stage.run("dvc", "status", "--json").strip() == "{}"
    assert list((stage.tmp / "store").rglob("runs")), "the run-cache was pushed"

    # Two events: one run takes the upstream's change, the other waits for it.
    change_upstream(stage)
    for _ in range(2):
        stage.run("prefect", "event", "emit", "kd.data.changed", "--resource-id", "kd.data")
    changed, same = stage.finished("retrain", 2, by_schedule=False)
    ran = changed["state"]["message"].removeprefix("ran ").split(", ")
    assert {"student", "exports@onnx"} <= set(ran)
    assert "teacher" not in ran
    assert same["state"]["message"] == "nothing changed"
    assert in_order([changed, same])
    after = registry(stage)
    assert after["aliases"]["challenger"] == "2"
    assert "against" in after["decisions"]["2"]

    # Housekeeping lists the first student's files, and keeps them until it is told otherwise.
    old = stage.root / ".kd/checkpoints/student/old.safetensors"
    old.parent.mkdir(parents=True, exist_ok=True)
    old.write_bytes(b"12345")
    os.utime(old, (0, 0))
    files = cached(stage)
    stage.run("prefect", "deployment", "run", "housekeeping/housekeeping")
    (listed,) = stage.finished("housekeeping", 1)
    assert listed["state"]["message"].startswith("dry run: DVC's cache: ")
    assert "checkpoints: 1 would be deleted, 5 bytes" in listed["state"]["message"]
    assert (cached(stage), old.exists()) == (files, True)
    stage.run(
        "prefect", "deployment", "run", "housekeeping/housekeeping", "--param", "dry_run=false"
    )
    *_, cleaned = stage.finished("housekeeping", 2)
    gone = int(cleaned["state"]["message"].split("DVC's cache: ")[1].split()[0])
    assert gone > 0
    assert (cached(stage), old.exists()) == (files - gone, False)
    assert stage.run("dvc", "status", "--json").strip() == "{}"
    assert "Data and pipelines are up to date" in stage.run("dvc", "repro")
    assert registry(stage) == after, "the champion's export still answers"
