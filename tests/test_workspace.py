"""The project as a newcomer has it: a clone, DVC, the flow, and what users do with them."""

import contextlib
import csv
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from tests.test_pipeline import PROJECT, experiment, same_files

pytestmark = pytest.mark.slow

VARY = ("latency.json", "report.md", "benchmark.json")
"""Files of artifacts/ that hold times; artifacts/runs differs as a whole."""
EACH_STEP = {"recipe.checkpoint_steps": 1}
"""So that a training can be killed at any step; every clone has it, since it is in the recipe."""


def clone(folder, tracking, **changes):
    """The project's own files in a new git repository, with a short experiment."""
    here = ["--exclude-standard", "--exclude=dvc.lock"]  # which says what was made in our folder
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", *here],
        cwd=PROJECT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (PROJECT / name).exists() and not name.startswith("tests/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(PROJECT / name, folder / name)
    experiment(folder, tracking=tracking, **(EACH_STEP | changes))
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
    assert remade_otherwise(folder, alone) == []


def remade_otherwise(one, other):
    """Files that the stages made in one clone, and not, or otherwise, in the other."""
    return [
        f"{stage.name}/{file}"
        for stage in (one / "artifacts").iterdir()
        if stage.name != "runs"
        for file in same_files(stage, other / "artifacts" / stage.name, ignore=VARY)
    ]


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


def test_the_views_in_mlflow_show_what_the_flow_logged(by_flow):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{by_flow[0]}/.kd/mlflow.db")
    saved = {
        key.removeprefix("mlflow.sharedViewState."): json.loads(json.loads(value)["state"])
        for key, value in client.get_experiment_by_name("kd").tags.items()
        if key.startswith("mlflow.sharedViewState.")
    }
    found, everything = {}, client.search_runs(["1"])
    for name, view in saved.items():
        runs = client.search_runs(["1"], view["searchFilter"])
        found[name] = {run.info.run_name for run in runs}
        for column in view["selectedColumns"]:
            kind, key = column.replace("`", "").split(".", 1)
            assert any(key in getattr(run.data, kind) for run in runs or everything), column
        charts = view.get("compareRunCharts", ())
        axes = {chart[axis]["key"] for chart in charts for axis in ("xaxis", "yaxis")}
        assert all(axes <= run.data.metrics.keys() for run in runs), axes
    assert found["networks"] >= {"teacher", "assistants/large", "student", "baselines/uniform"}
    assert found["weights"] >= {"weights/chosen", "weights/uniform"}
    assert "weights" not in found["weights"], "MLflow would hide the sets below it"
    assert found["exports"] >= {"exports/executorch_int8", "exports/onnx"}
    assert found["comparisons"] == set(), "none has run here; its networks log what these do"


@pytest.mark.parametrize("name", ["teacher", "assistants/large", "student"])
@pytest.mark.parametrize(
    "command", [["dvc", "repro"], [sys.executable, "-m", "flows.pipeline"]], ids=["dvc", "flow"]
)
def test_everything_killed_amid_a_training_goes_on_to_the_same_bits(
    by_flow, tmp_path, monkeypatch, command, name
):
    whole, folder = by_flow[0], shutil.copytree(by_flow[0], tmp_path / "copy", symlinks=True)
    model = Path("artifacts", name, "model.safetensors")
    never_trained(folder, name)
    step, point = any_step(whole / "artifacts" / name)
    with noting_saves(monkeypatch, name, tmp_path / "first.log", hold_at=point) as steps_saved:
        killed_once_held(folder, command, tmp_path / "first.held")
        assert max(steps_saved()) == step
    assert not (folder / model).exists()
    kept = folder / ".kd/checkpoints" / name
    assert list(kept.iterdir())
    with noting_saves(monkeypatch, name, tmp_path / "second.log") as steps_saved:
        said = run(folder, *command)
        assert min(steps_saved()) == step + 1, said  # none is done again, none is left out
    assert list(kept.iterdir()) == [], said
    assert (folder / model).read_bytes() == (whole / model).read_bytes()
    assert remade_otherwise(whole, folder) == []
    assert clean(folder) == {}


def never_trained(folder, name):
    """Take a stage's results out of the workspace, and out of DVC's memory of what it ran."""
    shutil.rmtree(folder / "artifacts" / name)
    shutil.rmtree(folder / ".dvc/cache/runs")
    lock = yaml.safe_load((folder / "dvc.lock").read_text())
    del lock["stages"][name.replace("/", "@")]
    (folder / "dvc.lock").write_text(yaml.safe_dump(lock, sort_keys=False))


def any_step(trained):
    """A step of a training but its last, and where to kill that training once it is saved.

    Where: as soon as it is, or when the next one is written too but has not yet taken its place.
    """
    with (trained / "curves.csv").open() as curves:
        steps = int(list(csv.DictReader(curves))[-1]["step"])
    step = random.randrange(1, steps)
    point = os.environ.get("KILL_AT") or random.choice([f"{step} saved", f"{step + 1} written"])
    print(f"killed at {point!r} of {steps} steps; KILL_AT={point!r} in the environment repeats it")
    number, word = point.split()
    return int(number) - (word == "written"), point


@contextlib.contextmanager
def noting_saves(monkeypatch, name, log, hold_at=""):
    """While the block runs, a training notes the steps it saves; yield what reads the notes."""
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(PROJECT / "tests/hold"), prepend=os.pathsep)
        patch.setenv("HOLD_FILES", f".kd/checkpoints/{name}/*.safetensors")
        patch.setenv("HOLD_LOG", str(log))
        patch.setenv("HOLD_AT", hold_at)
        yield lambda: [int(line) for line in log.read_text().splitlines()]


def killed_once_held(folder, command, held):
    """Kill -9 a command and all its processes once the file `held` says that one waits for it."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    started = psutil.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    until = time.monotonic() + 600
    try:
        while not held.exists():
            assert started.poll() is None, "it ended without having come to the step"
            assert time.monotonic() < until
            time.sleep(0.05)
    finally:
        family = [started]
        with contextlib.suppress(psutil.NoSuchProcess):
            family += started.children(recursive=True)
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        # DVC takes a process that init has not reaped for alive.
        psutil.wait_procs(family, timeout=60)


def test_one_more_assistant_is_one_more_key(by_flow, tmp_path):
    folder, _ = by_flow
    extra = {
        "taught_by": "teacher",
        "model": {"kind": "cifar_resnet", "depth": 8},
        "method": {"kind": "kd", "temperature": 4.0, "alpha": 0.9},
    }
    before = (folder / "params.yaml").read_text()
    experiment(folder, tracking=True, **EACH_STEP, **{"assistants.extra": extra})
    try:
        planned = run(folder, "dvc", "repro", "--dry")
    finally:
        (folder / "params.yaml").write_text(before)
    ran = {line.split("'")[1] for line in planned.splitlines() if line.startswith("Running stage")}
    assert "assistants@extra" in ran
    assert {"data", "teacher", "assistants@large", "assistants@small"}.isdisjoint(ran)


def test_an_edit_of_own_code_makes_stale_what_may_use_it(by_flow, tmp_path):
    folder = shutil.copytree(by_flow[0], tmp_path / "copy", symlinks=True)
    (folder / "mine.py").write_text("# first\n")
    experiment(folder, tracking=True, **EACH_STEP, code="mine.py")
    run(folder, "dvc", "commit", "--force")
    assert clean(folder) == {}
    (folder / "mine.py").write_text("# edited\n")
    stages = yaml.safe_load((folder / "dvc.lock").read_text())["stages"]
    assert set(clean(folder)) == set(stages)
    run(folder, "dvc", "commit", "--force", "teacher")
    assert set(clean(folder)) == set(stages) - {"teacher"}


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
    assert "or `git init` here" in run(folder, sys.executable, "-m", "flows.pipeline", status=1)
    shutil.rmtree(folder / ".dvc")
    assert "dvc init" in run(folder, sys.executable, "-m", "flows.pipeline", status=1)
    assert not (folder / "artifacts/teacher").exists()
