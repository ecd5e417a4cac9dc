"""A project with a DVC remote, and workers of a real Prefect server in clones of it."""

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from tests.flows import servers
from tests.flows.toys import SOURCES, Toy, wait_until


def git(root: Path, *words: str) -> str:
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    return subprocess.run(
        ["git", *who, *words], cwd=root, check=True, text=True, capture_output=True
    ).stdout


def commit(toy: Toy) -> None:
    git(toy.root, "add", ".")
    git(toy.root, "commit", "-q", "-m", "as the workers are to see it")


def with_remote(toy: Toy, url: str) -> None:
    """Give the project a DVC remote, and commit all of it."""
    toy.dvc("remote", "add", "--default", "shared", url)
    commit(toy)


class Worker:
    """`python -m flows.worker POOL` in a clone."""

    def __init__(self, clone: Path, pool: str, **env: str) -> None:
        self.clone = clone
        self.log = clone.with_suffix(".log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "flows.worker", pool],
                cwd=clone,
                env={**os.environ, "PYTHONPATH": str(SOURCES), **env},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def kill(self) -> list[int]:
        """kill -9 of it and the flow runs it started; what these started is left to end itself.

        Return the processes that have to.
        """
        worker = psutil.Process(self.process.pid)
        family = worker.children(recursive=True)
        ours = [each for each in family if "leash.py" not in " ".join(each.cmdline())]
        leashed = {
            each.pid
            for leash in family
            if leash not in ours
            for each in [leash, *leash.children(recursive=True)]
        }
        for each in [worker, *(each for each in ours if each.pid not in leashed)]:
            each.kill()
        self.process.wait()
        return sorted(leashed)

    def end(self) -> None:
        """SIGTERM, as `kill` sends it, and kill -9 to what is left after it."""
        if self.process.poll() is not None:
            return
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for each in family:
            if each.is_running():
                each.kill()


@contextmanager
def workers(project: Path, clones: dict[str, str], **env: str) -> Iterator[list[Worker]]:
    """Workers, each in a clone of its own beside the project, once the server knows them.

    Args:
        project: What they clone.
        clones: The pool that each one serves, by the clone's name.
        env: What their environment has beside ours.
    """
    with ExitStack() as running:
        found = []
        for name, pool in clones.items():
            clone = project.parent / name
            git(project, "clone", "-q", str(project), str(clone))
            found.append(Worker(clone, pool, **env))
            running.callback(found[-1].end)
        for each in found:
            wait_until(partial(_started, each))
        yield found


def _started(worker: Worker) -> bool:
    said = worker.log.read_text()
    assert worker.process.poll() is None, said
    return "started!" in said


@contextmanager
def flow(project: Toy, **env: str) -> Iterator[subprocess.Popen[str]]:
    """`python -m flows.pipeline --remote`, for as long as the block runs."""
    process = project.start("--remote", **env)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def object_store(folder: Path) -> servers.Server:
    """A server that speaks S3, with an empty bucket."""
    command = [sys.executable, "-m", "moto.server", "--port"]
    store = servers.Server(folder, "/", lambda port: [*command, str(port)])
    bucket = urllib.request.Request(f"{store.url}/bucket", method="PUT")
    urllib.request.urlopen(bucket, timeout=30).close()
    return store


def mlflow_runs(address: str) -> list[dict[str, Any]]:
    """All runs of the experiment kd, with times in seconds."""

    def ask(what: str, **words: Any) -> Any:
        request = urllib.request.Request(
            f"{address}/api/2.0/mlflow/{what}",
            data=json.dumps(words).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    experiments = ask("experiments/search", max_results=10)["experiments"]
    (kd,) = [each["experiment_id"] for each in experiments if each["name"] == "kd"]
    return [
        {
            "name": run["info"]["run_name"],
            "status": run["info"]["status"],
            "start": run["info"]["start_time"] / 1000,
            "end": run["info"]["end_time"] / 1000,
            "tags": {each["key"]: each["value"] for each in run["data"]["tags"]},
        }
        for run in ask("runs/search", experiment_ids=[kd])["runs"]
    ]


def stage_runs() -> list[Any]:
    """The flow runs that workers were handed, oldest first."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        flow = client.read_flow_by_name("stage")
        runs = [each for each in client.read_flow_runs() if each.flow_id == flow.id]
    return sorted(runs, key=lambda each: each.created)
