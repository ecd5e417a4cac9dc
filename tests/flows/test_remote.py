"""Stages on workers in other clones: a real server, real worker processes, a real DVC remote."""

import contextlib
import itertools
import logging
import os
import re
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows import graph, locks, needs
from flows.checkpoints import OLD, Checkpoints
from flows.child import Stopped
from flows.stage import StageFailedError
from tests.flows import servers, workers
from tests.flows.toys import (
    FOREIGN_WARNINGS,
    SOURCES,
    Toy,
    lives,
    pid_in,
    timed,
    wait_until,
)

pytestmark = FOREIGN_WARNINGS


@pytest.fixture
def project(toy: Toy) -> Toy:
    toy.path(".gitignore").write_text(".kd\n/*.txt\n")
    toy.write({"one": timed("one", 0)}, tracking=False)
    workers.with_remote(toy, str(toy.root.parent / "remote"))
    return toy


def refused(toy: Toy) -> str:
    with pytest.raises(needs.WorkersCannotError) as error:
        needs.check(toy.root)
    return str(error.value)


def test_what_is_committed_and_can_be_fetched_will_do(project: Toy) -> None:
    assert needs.check(project.root) == workers.git(project.root, "rev-parse", "HEAD").strip()
    project.path("dvc.lock").write_text("schema: '2.0'\n")  # which the pipeline itself writes
    needs.check(project.root)


def test_what_workers_cannot_see_is_named(project: Toy) -> None:
    project.write({"one": timed("one", 1)}, tracking=False)
    project.path("my notes").write_text("")
    assert 'dvc.yaml, "my notes": commit' in refused(project)
    for name in ("one", "three", "two"):
        project.path(name).touch()
    assert 'dvc.yaml, "my notes", one and 2 more: commit' in refused(project)


def test_a_commit_that_nobody_can_fetch_is_named(project: Toy) -> None:
    workers.git(project.root, "clone", "-q", "--bare", ".", "../origin.git")
    workers.git(project.root, "remote", "add", "origin", "../origin.git")
    workers.git(project.root, "fetch", "-q", "origin")
    needs.check(project.root)
    workers.git(project.root, "commit", "-q", "--allow-empty", "-m", "later")
    assert "`git push` first" in refused(project)


def test_a_project_without_a_commit_or_a_dvc_remote_is_told_so(toy: Toy) -> None:
    toy.write({}, tracking=False)
    assert "commit first" in refused(toy)
    workers.commit(toy)
    assert "`dvc remote add --default NAME URL`" in refused(toy)


def test_a_remote_without_a_run_cache_is_refused(project: Toy) -> None:
    project.dvc("remote", "modify", "shared", "url", "https://example.org/dvc")
    workers.commit(project)
    assert "shared is reached by HTTP" in refused(project)


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("", "set MLFLOW_TRACKING_URI to a server's address"),
        ("file:///mlruns", "set MLFLOW_TRACKING_URI to a server's address"),
        ("sqlite:///mlflow.db", "set MLFLOW_TRACKING_URI to a server's address"),
        ("https://me:secret@example.org", "holds a password"),
        ("https://example.org", None),
    ],
)
def test_mlflow_must_be_within_the_workers_reach(
    project: Toy, monkeypatch: pytest.MonkeyPatch, uri: str, said: str | None
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    project.write({"one": timed("one", 0)}, tracking=True)
    workers.commit(project)
    if said:
        assert said in refused(project)
    else:
        needs.check(project.root)


def test_workers_are_told_no_password_even_if_nothing_is_tracked(
    project: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs.check(project.root)  # tracking is false there
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@example.org")
    assert "holds a password" in refused(project)


@pytest.mark.parametrize(
    ("said", "tracks"), [("", True), ("tracking: yes", True), ("tracking: off", False)]
)
def test_whether_stages_track_is_read_as_they_read_it(
    project: Toy, monkeypatch: pytest.MonkeyPatch, said: str, tracks: bool
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    project.path("params.yaml").write_text(f"unused: 0\n{said}\n")
    workers.commit(project)
    if tracks:
        assert "set MLFLOW_TRACKING_URI" in refused(project)
    else:
        needs.check(project.root)


def test_without_a_server_or_a_worker_nothing_is_handed_out(
    project: Toy, prefect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, _ = (process := project.start("--remote", PREFECT_API_URL=prefect)).communicate()
    assert process.returncode == 1
    assert "start one, in a clone of its own, by `python -m flows.worker cpu`" in said
    monkeypatch.delenv("PREFECT_API_URL")
    said, _ = (process := project.start("--remote")).communicate()
    assert process.returncode == 1
    assert "set PREFECT_API_URL" in said


def test_a_stage_that_no_worker_is_left_for_says_so_and_waits(
    prefect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.client.orchestration import get_client  # reads settings when imported
    from prefect.client.schemas.actions import WorkPoolCreate

    from flows import remote

    monkeypatch.setattr(remote, "PATIENCE", 0.0)
    monkeypatch.setattr(remote, "POLL", 0.05)
    asked, stop, attended = itertools.count(1), threading.Event(), remote._attended

    def ask(*question: Any) -> bool:
        if next(asked) == 3:
            stop.set()
        return attended(*question)

    monkeypatch.setattr(remote, "_attended", ask)
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name="left", type="process"))
        flow_id = client.create_flow_from_name("stage")
        deployment = client.create_deployment(flow_id, "left", work_pool_name="left")
        run = client.create_flow_run_from_deployment(deployment)
        said: list[str] = []
        log = logging.getLogger("left")  # Prefect takes pytest's handlers off
        log.addFilter(lambda record: said.append(record.getMessage()) is not None)
        with pytest.raises(Stopped):
            remote.HandedOut(client, run.id, "left", log, stop).follow()
        state = client.read_flow_run(run.id).state
    assert state is not None
    assert state.is_cancelled()
    assert said == [
        "waits, but no worker of work pool left is online: start one, in a clone of its own, "
        "by `python -m flows.worker left`"
    ]


def test_a_stage_whose_workers_die_is_handed_out_anew_but_not_for_ever(
    project: Toy, prefect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.client.orchestration import get_client  # reads settings when imported
    from prefect.client.schemas.actions import LogCreate, WorkPoolCreate
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
    from prefect.states import Running

    from flows import remote

    monkeypatch.setattr(remote, "POOLS", ("none", "deadly"))
    monkeypatch.setattr(remote, "PATIENCE", 0.2)
    monkeypatch.setattr(remote, "POLL", 0.05)
    plan = graph.read(project.root)
    ahead: list[float] = []
    said: list[tuple[str, str]] = []
    log = logging.getLogger("deadly")
    log.addFilter(lambda it: said.append((it.getMessage(), it.stage_state)) is not None)  # type: ignore[attr-defined]
    log.setLevel(logging.INFO)

    def runs() -> Any:
        ours = DeploymentFilter(id=DeploymentFilterId(any_=[*places.deployments.values()]))
        return client.read_flow_runs(deployment_filter=ours)

    def take_and_die(client: Any, pool: str) -> bool:
        for run in runs() if said else []:
            if run.state.is_scheduled():
                ahead.append((run.created - run.next_scheduled_start_time).total_seconds())
                now = {"level": logging.INFO, "timestamp": run.created, "flow_run_id": run.id}
                lines = {"prefect.flow_runs.stage": "starts on a", "prefect.flow_runs": "begins"}
                client.create_logs(
                    [LogCreate(name=name, message=line, **now) for name, line in lines.items()]
                )
                client.set_flow_run_state(run.id, Running(), force=True)
        return True

    monkeypatch.setattr(remote, "_attended", take_and_die)
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name="deadly", type="process"))
        places = remote.Workers(project.root, plan, {"one": 3600.0})
        assert list(places.deployments) == ["deadly"]
        killed = places._order(plan.stages[0], {"KD_PIPELINE_RUN": "killed"})
        left = places._hand_out(client, killed)  # which the next flow finds under way
        env = {"KD_PIPELINE_RUN": "next"}
        with pytest.raises(StageFailedError, match=r"no sign of life for 0\.2 s"):
            places.run(plan.stages[0], env=env, log=log, stop=threading.Event(), hold=[])
        found = sorted(runs(), key=lambda run: run.created)
    assert [run.state.name for run in found] == ["Crashed"] * remote.LIVES
    assert found[0].id == left
    assert [set(run.tags) for run in found] == [{"kd", "killed"}, *[{"kd", "next"}] * 2]
    assert ahead == pytest.approx([3600] * 3, abs=60)  # long ones are taken first
    once = [
        ("waits for a worker of pool deadly", "waiting"),
        ("starts on a", "running"),
        ("lost its worker (no sign of life for 0.2 s)", "stopped"),
    ]
    assert said == once * remote.LIVES


@pytest.fixture
def clone(project: Toy, monkeypatch: pytest.MonkeyPatch) -> Toy:
    """A clone that a worker serves from this process: a stage is called here as it is there."""
    workers.git(project.root.parent, "clone", "-q", str(project.root), "clone")
    clone = Toy(project.root.parent / "clone")
    monkeypatch.setenv("KD_CLONE", str(clone.root))
    return clone


def ordered(project: Toy, name: str, **env: str) -> Any:
    """The order that a flow hands out for a stage."""
    from flows.remote_stage import Order

    stage = next(each for each in graph.read(project.root).stages if each.name == name)
    commit = workers.git(project.root, "rev-parse", "HEAD").strip()
    return Order(stage, commit, *graph.tracked_inputs(project.root, [name]), env)


def test_a_clone_takes_the_commit_and_inputs_of_each_order_and_keeps_its_own_servers(
    project: Toy, clone: Toy, prefect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.remote_stage import stage  # after `prefect` has set its environment

    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "the worker's")
    said = "$MLFLOW_EXPERIMENT_NAME $KD_PIPELINE_RUN"
    for number in range(2):  # the second time over what the first one left
        one = {"cmd": f"echo {number} > one.txt", "outs": ["one.txt"]}
        two = {"cmd": f"(cat one.txt; echo {said}) > two.txt", "deps": ["one.txt"]}
        project.write({"one": one, "two": two | {"outs": ["two.txt"]}}, tracking=False)
        workers.commit(project)  # with dvc.lock as the last run left it
        project.dvc("repro", "one")
        project.dvc("push")
        clone.path("one.txt").write_text("half of it, of a stage that was killed")
        stage(ordered(project, "two", KD_PIPELINE_RUN="run", MLFLOW_EXPERIMENT_NAME="the flow's"))
        assert "is cached - skipping run" in project.dvc("repro", "--pull", "two")
        assert project.path("two.txt").read_text() == f"{number}\nthe worker's run\n"


def test_a_stage_that_is_cancelled_ends_in_its_clone_which_is_one_flows_alone(
    project: Toy, clone: Toy, prefect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.client.orchestration import get_client
    from prefect.states import Cancelling

    from flows import remote_stage

    monkeypatch.setattr(remote_stage, "BEAT_SECONDS", 0.1)
    train = {"cmd": "echo $$ > PID; sleep 60; echo > one.txt", "outs": ["one.txt"]}
    project.write({"one": train}, tracking=False)
    workers.commit(project)
    order = ordered(project, "one")
    with locks.workspace(clone.root):
        busy = remote_stage.stage(order, return_state=True)
    assert "WorkspaceBusyError" in str(busy.message)

    def cancel() -> None:
        wait_until(clone.path("PID").exists)
        with get_client(sync_client=True) as client:
            run = max(client.read_flow_runs(), key=lambda each: each.created or 0)
            client.set_flow_run_state(run.id, Cancelling())

    other = threading.Thread(target=cancel)
    other.start()
    remote_stage.stage(order, return_state=True)
    other.join()
    assert not lives(pid_in(clone.path("PID")))
    assert not clone.path("one.txt").exists()


def test_a_worker_refuses_a_folder_that_somebody_works_in(project: Toy, prefect: str) -> None:
    project.path("notes").write_text("")
    worker = workers.Worker(project.root, "cpu", PREFECT_API_URL=prefect)
    assert worker.process.wait(30) == 1
    assert "give it a clone of its own:\n?? notes" in worker.log.read_text()


@pytest.fixture
def distillation(tmp_path: Path, template: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    """This project up to the weights, of two assistants, which train for a while."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("KD_CPUS", "2")
    root = tmp_path / "project"
    workers.git(tmp_path, "clone", "-q", "--no-local", str(SOURCES), str(root))
    workers.git(root, "remote", "remove", "origin")
    # dvc.lock says what was made in the folder that tests run from, of another experiment.
    new = ("ls-files", "--modified", "--others", "--exclude-standard", "--exclude=dvc.lock")
    for path in workers.git(SOURCES, *new).splitlines():
        shutil.copy(SOURCES / path, root / path)
    pipeline = yaml.safe_load((root / "dvc.yaml").read_text())
    wanted = ("data", "teacher", "assistants", "weights")
    pipeline["stages"] = {name: pipeline["stages"][name] for name in wanted}
    (root / "dvc.yaml").write_text(yaml.safe_dump(pipeline))
    params = yaml.safe_load((root / "params.yaml").read_text())
    params["recipe"] |= {"epochs": 2, "checkpoint_steps": 5}
    del params["assistants"]["small"]
    # The large one has to outlast two uploads of its state, 10 s apart, on a fast machine too.
    for name, epochs in {"large": 500, "medium": 150}.items():
        params["assistants"][name]["recipe"] = {"epochs": epochs}
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    project = Toy(root)
    workers.with_remote(project, str(tmp_path / "remote"))
    return project


@pytest.mark.slow
def test_workers_in_clones_end_as_one_machine_does_though_one_is_killed(
    distillation: Toy, prefect: str, tmp_path: Path
) -> None:
    project, root = distillation, distillation.root
    env = {"PREFECT_API_URL": prefect, "PREFECT_WORKER_QUERY_SECONDS": "2"}
    clones = {"a": "gpu", "b": "gpu", "c": "cpu"}
    with (
        contextlib.closing(servers.mlflow(tmp_path)) as mlflow,
        workers.workers(root, clones, **env) as pool,
        workers.flow(project, MLFLOW_TRACKING_URI=mlflow.url, **env) as flow,
    ):

        def saved(folder: Path, name: str) -> bool:
            return any((folder / "checkpoints" / "assistants" / name).rglob("*.safetensors"))

        def at_work(name: str) -> list[workers.Worker]:
            return [each for each in pool if saved(each.clone / ".kd", name)]

        # Both train at once, and then one's last state can be had elsewhere.
        wait_until(lambda: at_work("large") and at_work("medium"), patience=600)
        (killed,) = at_work("large")
        assert at_work("medium") != [killed]
        wait_until(lambda: saved(tmp_path / "remote", "large"))
        assert at_work("large") == [killed], "it ended too soon to be killed"
        left = killed.kill()
        wait_until(lambda: not any(map(lives, left)))
        said, _ = flow.communicate(timeout=600)
        assert flow.returncode == 0, said
        runs = workers.mlflow_runs(mlflow.url)

    lost = said.index("lost its worker (no sign of life for 60 s)")
    again = re.findall(r"assistants/large  epoch (\d+)/", said[lost:])
    assert int(again[0]) > 1  # it went on, and did not begin again
    assert project.status() == {}
    assert not saved(tmp_path / "remote", "large")

    runs = [each for each in runs if not each["name"].startswith("weights/")]  # below weights
    by_name = {(each["name"], each["status"]): each for each in runs}
    assert set(by_name) == {
        ("assistants/large", "KILLED"),
        *((each, "FINISHED") for each in ("data", "teacher", "weights")),
        *((f"assistants/{each}", "FINISHED") for each in ("large", "medium")),
    }
    one, other = by_name["assistants/large", "KILLED"], by_name["assistants/medium", "FINISHED"]
    seconds = min(one["end"], other["end"]) - max(one["start"], other["start"])
    assert seconds > 0, by_name
    assert len({each["tags"]["kd.pipeline_run"] for each in runs}) == 1
    assert {each["tags"]["dvc.stage"] for each in runs} <= {
        each.name for each in workers.stage_runs()
    }

    alone = Toy(tmp_path / "alone")
    workers.git(tmp_path, "clone", "-q", str(root), str(alone.root))
    alone.path("params.yaml").write_text(
        alone.path("params.yaml").read_text().replace("tracking: true", "tracking: false")
    )
    alone.dvc("repro")
    assert contents(alone) == contents(project)


def contents(project: Toy) -> dict[str, str]:
    """The MD5 of every output but those that hold times and hosts."""
    stages = yaml.safe_load(project.path("dvc.lock").read_text())["stages"].values()
    outs = {out["path"]: out["md5"] for stage in stages for out in stage["outs"]}
    return {path: md5 for path, md5 in outs.items() if not path.startswith("artifacts/runs/")}


@pytest.mark.slow
def test_results_come_back_through_an_object_store(
    toy: Toy, prefect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("dvc_s3", "moto.server"):
        pytest.importorskip(package, reason="needs `pip install 'dvc[s3]' 'moto[server]'`")
    toy.path(".gitignore").write_text(".kd\n/*.txt\n")
    both = {"cmd": "cat code one.txt > two.txt", "deps": ["code", "one.txt"], "outs": ["two.txt"]}
    toy.write({"one": timed("one", 0), "two": both}, tracking=False)
    toy.path("code").write_text("1")
    toy.dvc("repro", "one")  # is here alone, so it has to be sent first
    with contextlib.closing(workers.object_store(tmp_path)) as store:
        for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(key, "any")
        toy.dvc("remote", "add", "shared", "s3://bucket/dvc")
        toy.dvc("remote", "modify", "shared", "endpointurl", store.url)
        toy.dvc("remote", "default", "shared")
        workers.commit(toy)
        check_checkpoints(toy)
        env = {"PREFECT_API_URL": prefect}
        with workers.workers(toy.root, {"a": "cpu"}, **env), workers.flow(toy, **env) as flow:
            said, _ = flow.communicate(timeout=300)
    assert flow.returncode == 0, said
    assert "two | starts on" in said
    assert toy.path("two.txt").read_text() == "1" + toy.path("one.txt").read_text()
    assert toy.status() == {}


def test_checkpoints_go_to_the_remote_and_with_their_training_they_are_gone(project: Toy) -> None:
    check_checkpoints(project)


def check_checkpoints(project: Toy) -> None:
    complaints: list[str] = []
    here = project.path(".kd/checkpoints/one")

    def carried() -> contextlib.AbstractContextManager[None]:
        return Checkpoints(project.root, "one", complaints.append).carried()

    def stopped(*names: str) -> None:
        """A training that is stopped, and saves its state before it ends."""
        with contextlib.suppress(Stopped), carried():
            here.mkdir(parents=True, exist_ok=True)
            for name in names:
                (here / f"{name}.safetensors").write_text(name)
            raise Stopped

    def brought() -> list[str]:
        """What another clone is brought, and loses as it is stopped."""
        shutil.rmtree(here, ignore_errors=True)
        with contextlib.suppress(Stopped), carried():
            found = sorted(each.stem for each in here.glob("*.safetensors"))
            shutil.rmtree(here, ignore_errors=True)
            raise Stopped
        return found

    stopped("first", "second")
    assert brought() == ["first", "second"]
    params = project.path("params.yaml").read_text()
    project.path("params.yaml").write_text(params.replace("0", "1"))  # which `one` does not read
    assert brought() == ["first", "second"]
    pipeline = project.path("dvc.yaml").read_text()
    project.path("dvc.yaml").write_text(pipeline.replace('"outs"', '"params": ["unused"], "outs"'))
    assert brought() == []
    stopped("other")
    with carried():  # as a training does that has come to its end
        shutil.rmtree(here)
    assert brought() == []
    project.path("dvc.yaml").write_text(pipeline)
    project.path("params.yaml").write_text(params)
    assert brought() == ["first", "second"]
    (here / "elsewhere.safetensors").parent.mkdir(parents=True)
    (here / "elsewhere.safetensors").write_text("another experiment's, of this clone")
    stopped("third")
    assert brought() == ["first", "second", "third"]
    assert complaints == []


def test_what_others_left_on_the_remote_long_ago_goes(project: Toy, tmp_path: Path) -> None:
    complaints: list[str] = []
    left = [tmp_path / f"remote/checkpoints/one/{name}/a.safetensors" for name in ("old", "new")]
    for path in left:
        path.parent.mkdir(parents=True)
        path.touch()
    os.utime(left[0], (time.time() - OLD - 60,) * 2)
    with Checkpoints(project.root, "one", complaints.append).carried():
        pass
    assert [path.exists() for path in left] == [False, True]
    assert complaints == []


@pytest.mark.slow
def test_a_worker_is_alone_in_its_clone_and_leaves_the_checkpoints_if_it_cannot_push(
    project: Toy, prefect: str, tmp_path: Path
) -> None:
    remote, saved = tmp_path / "remote", ".kd/checkpoints/one/a.safetensors"
    train = [
        f"mkdir -p $(dirname {saved}) && echo state > {saved}",
        f"until ls {remote}/checkpoints/one/*/a.safetensors; do sleep 0.1; done",
        f"rm {saved}",
        f"mv {remote}/files {remote}/away; touch {remote}/files",
        "echo result > one.txt",
    ]
    project.write({"one": {"cmd": train, "outs": ["one.txt"]}}, tracking=False)
    project.path("sent").write_text("so that the remote has files")
    project.dvc("add", "sent")
    project.dvc("push")
    workers.commit(project)
    env = {"PREFECT_API_URL": prefect}
    with workers.workers(project.root, {"a": "cpu"}, **env) as (worker,):
        second = workers.Worker(worker.clone, "cpu", **env)
        assert second.process.wait(60) == 1
        assert "another worker is running in this clone" in second.log.read_text()
        with workers.flow(project, **env) as flow:
            said, _ = flow.communicate(timeout=300)
    assert flow.returncode == 1, said
    assert "`dvc push" in said
    assert [path.read_text() for path in remote.glob("checkpoints/one/*/*")] == ["state\n"]
