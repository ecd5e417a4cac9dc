"""What befalls a run from outside, with real servers: nothing is lost, the next one completes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import psutil
import pytest

from tests.flows import servers, toys
from tests.flows.toys import FOREIGN_WARNINGS, Toy, endless, lives, pid_in, timed, wait_until

pytestmark = [FOREIGN_WARNINGS, pytest.mark.slow]

TRACKED = """
import sys, time
from kd import tracking
from kd.machine import write_run_record
name, epochs = sys.argv[1], int(sys.argv[2])
began = time.time()
with tracking.run(name, params={}, tags={}) as run:
    for epoch in range(1, epochs + 1):
        run.log_epoch(epoch, {"val_nll": 1 / epoch})
        open("at_" + name, "w").write(str(epoch))
        time.sleep(1)
    run.log_final({"val_accuracy": 0.5})
    write_run_record(name, began, run.id, run.url)
print("seconds", round(time.time() - began), "lost", run.error)
"""


@pytest.fixture(scope="module")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Server]:
    server = servers.prefect(tmp_path_factory.mktemp("prefect"))
    yield server
    server.kill()


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Server]:
    server = servers.mlflow(tmp_path_factory.mktemp("mlflow"))
    yield server
    server.kill()


def flow(toy: Toy, server: servers.Server, **env: str) -> subprocess.Popen[str]:
    return toy.start(PREFECT_API_URL=f"{server.url}/api", **env)


def said_by(process: subprocess.Popen[str], patience: float = 180) -> str:
    return process.communicate(timeout=patience)[0]


def ask(server: servers.Server, path: str, **body: Any) -> Any:
    """What a server's interface answers; a question with a body is a POST."""
    request = urllib.request.Request(
        f"{server.url}/api/{path}",
        data=json.dumps(body).encode() if body else None,
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def run_in(toy: Toy) -> str:
    """The id of the last Prefect run of a workspace."""
    return str(UUID(toy.path(".kd/flow.run").read_text()))


def states(server: servers.Server, run: str) -> dict[str, str]:
    """The states of a flow run, as "", and of its task runs."""
    tasks = ask(server, "task_runs/filter", flow_runs={"id": {"any_": [run]}})
    found = {each["name"]: each["state_type"] for each in tasks}
    return {"": ask(server, f"flow_runs/{run}")["state_type"], **found}


def test_prefects_server_killed_and_started_again_amid_a_training(
    toy: Toy, prefect_server: servers.Server
) -> None:
    toy.write({"train": timed("train", 15), "next": timed("next", 0, deps=["train.txt"])})
    process = flow(toy, prefect_server)
    wait_until(lambda: "starts on" in process.stdout.readline())  # type: ignore[union-attr]
    prefect_server.kill()
    time.sleep(5)
    prefect_server.start()
    said = said_by(process)
    assert process.returncode == 0, said
    assert toy.status() == {}
    done = {"": "COMPLETED", "train": "COMPLETED", "next": "COMPLETED"}
    wait_until(lambda: states(prefect_server, run_in(toy)) == done)


def test_prefects_server_gone_for_good_costs_its_record_and_no_training(
    toy: Toy, prefect_server: servers.Server
) -> None:
    toy.write({"train": timed("train", 5), "next": timed("next", 0, deps=["train.txt"])})
    process = flow(toy, prefect_server, PREFECT_CLIENT_MAX_RETRIES="2")
    wait_until(lambda: "starts on" in process.stdout.readline())  # type: ignore[union-attr]
    prefect_server.kill()
    said = said_by(process)
    assert process.returncode == 1
    assert "Traceback" not in said, said
    assert "error: Prefect" in said, said
    assert toy.status() == {}
    lost = run_in(toy)
    prefect_server.start()
    toy.path("next.txt").unlink()
    said = said_by(again := flow(toy, prefect_server))
    assert again.returncode == 0, said
    # The one that could not say how it ended is closed by the one after it.
    assert set(states(prefect_server, lost).values()) <= {"CRASHED", "COMPLETED"}
    assert states(prefect_server, lost)[""] == "CRASHED"


def test_mlflows_server_away_amid_a_training_gets_all_of_it_later(
    toy: Toy, prefect_server: servers.Server, mlflow_server: servers.Server
) -> None:
    toy.path("tracked.py").write_text(TRACKED)
    toy.path("artifacts").mkdir()
    toy.write(
        {
            "teacher": {
                "cmd": "python tracked.py teacher 20",
                "deps": ["tracked.py"],
                "outs": ["artifacts/runs/teacher.json"],
            },
            "weights": {
                "cmd": "until test $(cat at_teacher) -ge 8; do sleep 0.1; done; "
                "python tracked.py weights 2",
                "outs": ["artifacts/runs/weights.json"],
            },
        }
    )
    process = flow(
        toy,
        prefect_server,
        MLFLOW_TRACKING_URI=mlflow_server.url,
        KD_RECORDER_IDLE="2",
    )
    at_teacher = toy.path("at_teacher")
    wait_until(lambda: at_teacher.exists() and int(at_teacher.read_text() or 0) >= 3)
    mlflow_server.kill()
    wait_until(lambda: toy.path("at_teacher").read_text() == "20")  # it does not wait
    time.sleep(15)
    assert process.poll() is None
    mlflow_server.start()
    said = said_by(process)
    assert process.returncode == 0, said
    assert "is unreachable" in said
    assert said.count("lost None") == 2, said
    assert toy.status() == {}

    # From Prefect's tasks to MLflow's runs.
    run = run_in(toy)
    artifacts = ask(prefect_server, "artifacts/filter", flow_runs={"id": {"any_": [run]}})
    for stage, epochs in ("teacher", 20), ("weights", 2):
        (shown,) = (each for each in artifacts if each["key"] == f"stage-{stage}")
        (link,) = re.findall(r"\[Its run in MLflow\]\((\S+)\)", shown["data"])
        assert link.startswith(f"{mlflow_server.url}/#/experiments/")
        assert urllib.request.urlopen(link).status == 200
        run_id = link.partition("/runs/")[2].partition("?")[0]
        assert f"made `artifacts/runs/{stage}.json`" in shown["data"]
        # And back.
        stored = ask(mlflow_server, f"2.0/mlflow/runs/get?run_id={run_id}")["run"]
        tags = {each["key"]: each["value"] for each in stored["data"]["tags"]}
        assert stored["info"]["status"] == "FINISHED"
        assert "kd.incomplete" not in tags
        back = tags["prefect.task_run_url"]
        assert back in tags["mlflow.note.content"]
        assert back == f"{prefect_server.url}/runs/task-run/{shown['task_run_id']}"
        assert ask(prefect_server, f"task_runs/{shown['task_run_id']}")["name"] == stage
        history = f"2.0/mlflow/metrics/get-history?run_id={run_id}&metric_key=val_nll"
        points = ask(mlflow_server, history)["metrics"]
        assert [each["step"] for each in points] == list(range(1, epochs + 1))


def test_a_stage_or_a_part_of_it_killed_by_force_fails_alone_and_leaves_nothing(
    toy: Toy, prefect_server: servers.Server
) -> None:
    names = ["trainer", "dvc", "leash"]
    code = "import os, time; open('PID_{0}', 'w').write(str(os.getpid())); time.sleep(600)"
    toy.write(
        {
            "first": timed("first", 0),
            **{
                each: {
                    "cmd": f'python -c "{code.format(each)}"; exit $?',
                    "deps": ["first.txt"],
                    "outs": [f"{each}.txt"],
                }
                for each in names
            },
            "other": timed("other", 8),
        }
    )
    process = flow(toy, prefect_server)
    trainers = {each: psutil.Process(pid_in(toy.path(f"PID_{each}"))) for each in names}
    above = trainers["leash"].parents()
    leash = next(each for each in above if "leash.py" in " ".join(each.cmdline()))
    dvc = next(each for each in trainers["dvc"].parents() if "repro" in each.cmdline())
    refused = flow(toy, prefect_server)  # two flows in one folder
    said = said_by(refused)
    assert refused.returncode == 1
    assert f"a flow (process {process.pid}, since" in said
    for each in trainers["trainer"], dvc, leash:
        each.send_signal(signal.SIGKILL)
    said = said_by(process)
    assert process.returncode == 1
    for each in names:
        assert re.search(rf"{each} ended with exit code \d+", said), said
        wait_until(lambda each=each: not lives(trainers[each].pid))
    assert set(toy.status()) == set(names)
    toy.write(
        {
            "first": timed("first", 0),
            **{each: timed(each, 0, deps=["first.txt"]) for each in names},
            "other": timed("other", 8),
        }
    )
    said = said_by(again := flow(toy, prefect_server))
    assert again.returncode == 0, said
    assert toy.status() == {}


def test_a_lock_of_dvcs_that_somebody_holds_is_waited_for(
    toy: Toy, prefect_server: servers.Server
) -> None:
    hold = (
        "import time; from dvc.repo import Repo\n"
        "with Repo('.') as repo, repo.lock:\n"
        "    open('held', 'w').close(); time.sleep(8)\n"
        "open('free', 'w').close()"
    )
    # It ends while the lock is held, and DVC's own patience of three seconds is over before 8 s.
    train = "touch at; until test -e held; do sleep 0.1; done; echo > train.txt"
    toy.write(
        {
            "train": {"cmd": train, "outs": ["train.txt"]},
            "next": timed("next", 0, deps=["train.txt"]),
        }
    )
    process = flow(toy, prefect_server)
    wait_until(toy.path("at").exists)
    holder = subprocess.Popen([sys.executable, "-c", hold], cwd=toy.root)
    said = said_by(process)
    assert holder.wait() == 0
    assert process.returncode == 0, said
    assert toy.path("free").stat().st_mtime < toy.path("next.txt").stat().st_mtime
    assert toy.status() == {}


def test_a_worker_killed_by_force_takes_its_run_along_and_the_next_one_completes(
    toy: Toy, prefect_server: servers.Server
) -> None:
    env = {
        **os.environ,
        "PYTHONPATH": str(toys.SOURCES),
        "PREFECT_API_URL": f"{prefect_server.url}/api",
        "PREFECT_HOME": str(toy.root.parent / "home"),
        "PREFECT_WORKER_QUERY_SECONDS": "2",
    }

    def prefect(*words: str) -> None:
        command = [sys.executable, "-m", "prefect", "--no-prompt", *words]
        subprocess.run(command, cwd=toy.root, env=env, check=True, capture_output=True)

    def work() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "here"]
        return subprocess.Popen(
            command, cwd=toy.root, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    toy.path("flows").symlink_to(toys.SOURCES / "flows")
    toy.path("prefect.yaml").write_text(
        json.dumps(
            {
                "pull": [
                    {
                        "prefect.deployments.steps.set_working_directory": {
                            "directory": str(toy.root)
                        }
                    }
                ],
                "deployments": [
                    {
                        "name": "killed",
                        "entrypoint": "flows/flow.py:pipeline",
                        "work_pool": {"name": "here"},
                    }
                ],
            }
        )
    )
    prefect("work-pool", "create", "here", "--type", "process")
    prefect("deploy", "--all")
    toy.write({"train": endless("train")})
    worker = work()
    prefect("deployment", "run", "pipeline/killed")
    wait_until(toy.path("PID").exists)
    trainer = pid_in(toy.path("PID"))
    run = run_in(toy)
    worker.kill()
    worker.wait()
    wait_until(lambda: not lives(trainer))
    wait_until(lambda: states(prefect_server, run)[""] == "CRASHED")
    toy.write({"train": timed("train", 0)})
    said = said_by(again := flow(toy, prefect_server))
    assert again.returncode == 0, said
    assert states(prefect_server, run)[""] == "CRASHED"
