"""The project as a newcomer has it: a clone, DVC, the flow, and what users do with them."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.test_pipeline import PROJECT, experiment, same_files

pytestmark = pytest.mark.slow

VARY = ("latency.json", "report.md", "benchmark.json")
"""Files of artifacts/ that hold times; artifacts/runs differs as a whole."""


def clone(folder, tracking, **changes):
    """The project's own files in a new git repository, with a short experiment."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=PROJECT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (PROJECT / name).exists() and not name.startswith("tests/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(PROJECT / name, folder / name)
    experiment(folder, tracking=tracking, **changes)
    run(folder, "git", "init", "-q")
    commit(folder, "begin")
    return folder


def run(folder, *command, status=0):
    """A command with the environment's programs first on the path; its output."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "COLUMNS": "120",
    }
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == status, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def commit(folder, message):
    run(folder, "git", "add", "--all")
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.invalid"]
    run(folder, "git", *identity, "commit", "-q", "-m", message)


def clean(folder):
    return json.loads(run(folder, "dvc", "status", "--json"))


@pytest.fixture(scope="module")
def by_flow(tmp_path_factory):
    """A clone in which the flow has run, tracked."""
    folder = clone(tmp_path_factory.mktemp("flow"), tracking=True)
    return folder, run(folder, sys.executable, "-m", "flows.pipeline")


def test_the_flow_ends_with_the_table_and_a_clean_workspace(by_flow):
    folder, said = by_flow
    for shown in ("teacher", "baselines/uniform", "ensemble/weighted", "model.pte", "make ui"):
        assert shown in said
    assert clean(folder) == {}


def test_after_the_flow_neither_tool_has_anything_to_do(by_flow):
    folder, _ = by_flow
    assert "Data and pipelines are up to date" in run(folder, "dvc", "repro")
    assert "Nothing to do" in run(folder, sys.executable, "-m", "flows.pipeline")


def test_dvc_alone_makes_the_same_bytes_and_leaves_the_flow_nothing_to_do(by_flow, tmp_path):
    folder, _ = by_flow
    alone = clone(tmp_path, tracking=False)
    run(alone, "dvc", "repro")
    assert clean(alone) == {}
    assert "Nothing to do" in run(alone, sys.executable, "-m", "flows.pipeline")
    for stage in (folder / "artifacts").iterdir():
        if stage.name != "runs":
            assert same_files(stage, alone / "artifacts" / stage.name, ignore=VARY) == []


def test_every_stage_of_the_flow_is_a_finished_run_in_mlflow(by_flow):
    folder, _ = by_flow
    script = """
import mlflow, json
runs = mlflow.search_runs(search_all_experiments=True, output_format="list")
print("FOUND" + json.dumps({r.info.run_name: r.info.status for r in runs}))
print("ALIASES" + json.dumps(mlflow.MlflowClient().get_registered_model("kd-student").aliases))
"""
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/.kd/mlflow.db"
    try:
        said = run(folder, sys.executable, "-c", script)
    finally:
        del os.environ["MLFLOW_TRACKING_URI"]
    lines = said.splitlines()
    found = json.loads(next(x for x in lines if x.startswith("FOUND")).removeprefix("FOUND"))
    records = {
        p.relative_to(folder / "artifacts/runs").with_suffix("").as_posix()
        for p in (folder / "artifacts/runs").rglob("*.json")
    }
    assert records <= set(found)
    assert "weights/chosen" in found
    assert set(found.values()) == {"FINISHED"}
    aliases = next(x for x in lines if x.startswith("ALIASES")).removeprefix("ALIASES")
    assert set(json.loads(aliases)) >= {"champion"}


@pytest.mark.parametrize(
    "command",
    [["dvc", "repro", "teacher"], [sys.executable, "-m", "flows.pipeline"]],
    ids=["dvc", "flow"],
)
def test_everything_killed_amid_a_training_goes_on_to_the_same_bits(by_flow, tmp_path, command):
    folder = shutil.copytree(by_flow[0], tmp_path / "copy", symlinks=True)
    # Decides nothing but how often the state is saved; DVC trains anew all the same.
    experiment(folder, tracking=True, **{"recipe.checkpoint_steps": 1})
    (kept,) = killed_once_it_saved(folder, command, "teacher")
    assert not (folder / "artifacts/teacher/model.safetensors").exists()
    said = run(folder, *command)
    assert not kept.exists(), said
    name = "artifacts/teacher/model.safetensors"
    assert (folder / name).read_bytes() == (by_flow[0] / name).read_bytes()


def killed_once_it_saved(folder, command, stage):
    """Kill -9 a command and all its processes once the stage has saved its state; the files."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    started = psutil.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    until = time.monotonic() + 300
    while not (kept := list((folder / ".kd/checkpoints" / stage).glob("*.safetensors"))):
        assert started.poll() is None
        assert time.monotonic() < until
        time.sleep(0.005)
    family = [started, *started.children(recursive=True)]
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(family, timeout=60)  # DVC takes a process that init has not reaped for alive
    return kept


def test_one_more_assistant_is_one_more_key(by_flow, tmp_path):
    folder, _ = by_flow
    extra = {
        "taught_by": "teacher",
        "model": {"kind": "cifar_resnet", "depth": 8},
        "method": {"kind": "kd", "temperature": 4.0, "alpha": 0.9},
    }
    before = (folder / "params.yaml").read_text()
    experiment(folder, tracking=True, **{"assistants.extra": extra})
    try:
        planned = run(folder, "dvc", "repro", "--dry")
    finally:
        (folder / "params.yaml").write_text(before)
    ran = {line.split("'")[1] for line in planned.splitlines() if line.startswith("Running stage")}
    assert "assistants@extra" in ran
    assert {"data", "teacher", "assistants@large", "assistants@small"}.isdisjoint(ran)


def test_experiments_and_differences_work(by_flow, tmp_path):
    folder = shutil.copytree(by_flow[0], tmp_path / "copy", symlinks=True)
    commit(folder, "first run")
    run(folder, "dvc", "exp", "run", "-S", "student.method.temperature=2")
    assert "student.method.temperature" in run(folder, "dvc", "params", "diff")
    changed = run(folder, "dvc", "metrics", "diff")
    assert "artifacts/student/metrics.json" in changed
    assert "artifacts/teacher/metrics.json" not in changed
    run(folder, "dvc", "plots", "diff")
    assert (folder / "dvc_plots/index.html").exists()
    shown = json.loads(run(folder, "dvc", "metrics", "show", "--json"))
    metrics = next(iter(shown.values()))["data"]["artifacts/student/metrics.json"]["data"]
    assert 0.2 < metrics["val_accuracy"] <= 1
    assert clean(folder) == {}


def test_a_workspace_without_git_or_dvc_is_refused_before_training(tmp_path):
    folder = clone(tmp_path, tracking=False)
    shutil.rmtree(folder / ".git")
    assert "git init" in run(folder, sys.executable, "-m", "flows.pipeline", status=1)
    shutil.rmtree(folder / ".dvc")
    assert "dvc init" in run(folder, sys.executable, "-m", "flows.pipeline", status=1)
    assert not (folder / "artifacts/teacher").exists()
