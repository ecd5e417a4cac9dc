"""Tracking against a real store, with real processes that are really killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from kd import artifacts, tracking
from kd.component import ConfigError
from kd.data import Digits, Splits, prepare
from kd.methods import KD
from kd.roles import learn
from kd.tracking import TrackingError, views
from kd.tracking.weights import log_weight_sets
from tests.test_roles import Watched, role

SOURCES = str(Path(tracking.__file__).parents[2])
pytestmark = pytest.mark.filterwarnings(
    # MLflow 3.17 with SQLAlchemy 2.1, in the client that these tests look at the store with.
    "ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning"
)
GIVEN = {"params": {"seed": 0}, "tags": {"kd.role": "student"}}
STAGE = """
import signal, sys, time
from kd import tracking
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background job
name, ending = sys.argv[1:]
with tracking.run("assistants", name, params={"recipe": {"ema": None}}, tags={}) as run:
    run.log_epoch(1, {"val_accuracy": 0.5})
    run.log_final({"val_accuracy": 0.75})
    print(run.id, flush=True)
    if ending == "raise":
        raise ValueError("loss is nan at step 7")
    if ending == "wait":
        time.sleep(60)
assert not {"mlflow", "pandas", "sqlalchemy", "torch"} & set(sys.modules)
"""


def spawn(name: str, ending: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", STAGE, name, ending],
        env={**os.environ, "PYTHONPATH": SOURCES},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_id_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    run_id = process.stdout.readline().strip()
    assert run_id, process.communicate()[1]
    return run_id


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for a process and close its pipes; what it said on stderr."""
    return process.communicate(timeout=60)[1]


def eventually(holds, seconds: float = 20):
    """The first true value of `holds`; recorders take a moment to notice a death."""
    until = time.monotonic() + seconds
    while not (value := holds()):
        assert time.monotonic() < until, "it never happened"
        time.sleep(0.1)
    return value


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A repository of its own with a store that eight stages at once were the first to touch."""
    root = tmp_path_factory.mktemp("repository")
    (root / "dvc.yaml").write_text(
        "stages:\n  student:\n    deps: [artifacts/data/train, kd/train]\n"
        "  assistants:\n    foreach: ${assistants}\n    do:\n"
        "      deps: [artifacts/data, 'artifacts/${key}/model', 'artifacts/${item.taught_by}']\n"
    )
    (root / "params.yaml").write_text("assistants: {a0: {taught_by: assistants/large}}\n")
    (root / "dvc.lock").write_text(
        "stages:\n  data:\n    outs:\n    - {path: artifacts/data/train, md5: aa.dir}\n"
        "    - {path: artifacts/data/val, md5: bb.dir}\n"
        "  other:\n    outs:\n    - {path: artifacts/a0/model, md5: cc}\n"
        "    - {path: artifacts/assistants/large, md5: dd}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("KD_RECORDER_IDLE", "20")
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        first = [spawn(f"a{i}", "end") for i in range(8)]
        said = [finish(process) for process in first]
        codes = [process.returncode for process in first]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of MLflow's many dependencies
            import mlflow
        client = mlflow.MlflowClient(tracking.tracking_uri())
        yield SimpleNamespace(root=root, client=client, first=codes, said=said)


@pytest.fixture
def in_home(home, monkeypatch):
    monkeypatch.chdir(home.root)
    return home


def ended(home, run_id: str):
    """The run, once it is no longer RUNNING."""
    return eventually(
        lambda: (run := home.client.get_run(run_id)).info.status != "RUNNING" and run
    )


def test_eight_stages_at_once_on_a_fresh_store_all_succeed(in_home):
    assert in_home.first == [0] * 8, in_home.said
    experiment = in_home.client.get_experiment_by_name("kd")
    runs = in_home.client.search_runs([experiment.experiment_id])
    assert {run.info.run_name for run in runs} >= {f"assistants/a{i}" for i in range(8)}
    assert all(run.info.status == "FINISHED" for run in runs)
    assert (in_home.root / ".kd" / "mlflow.db").exists()


def test_a_run_holds_flat_params_curves_finals_files_and_tags(in_home, tmp_path, monkeypatch):
    monkeypatch.setenv("KD_FLOW_RUN_ID", "flow-1")
    monkeypatch.setenv("KD_PIPELINE_RUN", "calm-otter")
    model = tmp_path / "model.pte"
    model.write_bytes(b"weights")
    with tracking.run(
        "student",
        None,
        params={"model": {"kind": "plain_cnn"}, "seed": 0},
        tags={"kd.role": "s", "kd.data_hash": "d" * 64},
    ) as run:
        for epoch in (1, 2, 3):
            run.log_epoch(epoch, {"val_nll": np.float32(1 / epoch)})
        run.log_final({"size_mb": 0.5, "val_nll": 0.75})
        run.log_curve({g: {"search/best": 10.0 - g} for g in range(1500)})
        run.log_file(model, "export")
        page = f"http://127.0.0.1:5000/#/experiments/1/runs/{run.id}"
        assert run.url == f"{page}?workflowType=machine_learning"
        run_id = run.id
    stored = in_home.client.get_run(run_id)
    assert stored.info.run_name == "student"
    assert stored.data.params == {"model.kind": "plain_cnn", "seed": "0"}
    assert (stored.data.metrics["size_mb"], stored.data.metrics["val_nll"]) == (0.5, 0.75)
    history = in_home.client.get_metric_history(run_id, "val_nll")
    assert [(point.step, point.value) for point in history] == [
        (1, 1.0),
        (2, 0.5),
        (3, pytest.approx(1 / 3)),
        (3, 0.75),
    ]
    (size,) = in_home.client.get_metric_history(run_id, "size_mb")
    assert size.step == 0  # which MLflow draws as a bar
    assert len(in_home.client.get_metric_history(run_id, "search/best")) == 1500
    assert (
        stored.data.tags.items()
        >= {
            "kd.stage": "student",
            "kd.name": "student",
            "kd.role": "s",
            "kd.host": socket.gethostname(),
            "kd.pid": str(os.getpid()),
            "prefect.flow_run_id": "flow-1",
            "kd.pipeline_run": "calm-otter",
            "mlflow.source.name": "kd student",
            "dvc.dep.artifacts/data/train": "aa.dir",
        }.items()
    )
    assert "dvc.dep.artifacts/data/val" not in stored.data.tags
    (data,) = (each.dataset for each in stored.inputs.dataset_inputs)
    assert data.digest == "d" * 36
    from mlflow.data import get_source

    assert get_source(data).uri == "artifacts/data"
    assert [f.path for f in in_home.client.list_artifacts(run_id, "export")] == [
        "export/model.pte"
    ]
    assert stored.info.artifact_uri.startswith(str(in_home.root / ".kd" / "mlruns"))


def test_a_training_that_goes_on_shows_the_epochs_before_the_stop_too(in_home):
    prepare(Digits(), Splits(), image_size=16, channels=1, seed=0, folder=artifacts.folder("data"))
    born_again = role(method=KD(), generations=2)
    with pytest.raises(KeyboardInterrupt):
        learn(born_again, Watched(stop_at=3))
    with tracking.run("teacher", None, params={}, tags={}) as run:
        learn(born_again, run)
        run_id = run.id
    history = in_home.client.get_metric_history(run_id, "train_loss")
    assert [point.step for point in history] == [1, 2, 3, 4]


def test_a_stage_of_several_is_tagged_with_what_its_own_name_reads(in_home):
    tags = in_home.client.search_runs(["1"], "tags.`kd.name` = 'a0'")[0].data.tags
    read = {key: value for key, value in tags.items() if key.startswith("dvc.dep.")}
    assert read == {
        "dvc.dep.artifacts/data": "train aa.dir, val bb.dir",
        "dvc.dep.artifacts/a0/model": "cc",
        "dvc.dep.artifacts/assistants/large": "dd",
    }


def test_the_experiment_has_views_that_find_runs_and_name_columns_as_runs_do(in_home):
    params = {"model": {"kind": "plain_cnn"}}
    runs = []
    shared = {"kd.comparison": "digits", "kd.cell": ""}  # a teacher, that is
    for tags in ({"kd.pipeline": "kd-test"}, {**shared, "kd.cell": "dist"}, shared):
        with tracking.run("student", params=params, tags=tags) as run:
            run.log_final({"val_accuracy": 0.9, "params_m": 0.1})
        runs.append(run.id)
    experiment = in_home.client.get_experiment_by_name("kd")
    prefix = "mlflow.sharedViewState."
    saved = {
        key.removeprefix(prefix): json.loads(json.loads(value)["state"])
        for key, value in experiment.tags.items()
        if key.startswith(prefix)
    }
    assert views.NETWORKS in views.address("1")
    assert saved.keys() == {views.NETWORKS, "weights", "exports", "comparisons"}
    found = {
        key: {each.info.run_id for each in in_home.client.search_runs(["1"], view["searchFilter"])}
        for key, view in saved.items()
    }
    networks, cell, teacher = runs
    assert [key for key in saved if networks in found[key]] == [views.NETWORKS]
    assert [key for key in saved if cell in found[key]] == ["comparisons"]
    assert not [key for key in saved if teacher in found[key]], "no mean over cells has it"
    assert {"metrics.`val_accuracy`", "params.`model.kind`"} <= set(
        saved[views.NETWORKS]["selectedColumns"]
    )
    run = "tags.`kd.pipeline_run`"
    shows_run = {key for key, view in saved.items() if run in view["selectedColumns"]}
    assert shows_run == saved.keys() - {"comparisons"}, "no run of the pipeline makes those"


def test_a_user_without_a_name_is_a_number(monkeypatch):
    from kd.tracking import provenance

    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    assert provenance._user() == str(os.getuid())


def test_system_metrics_are_sampled(in_home):
    with tracking.run("student", **GIVEN) as run:
        time.sleep(3)
    assert "system/cpu_utilization_percentage" in in_home.client.get_run(run.id).data.metrics


def append_line(path: Path) -> None:
    path.write_text(path.read_text() + "\n")


def test_git_tags_say_the_commit_and_ignore_what_the_pipeline_itself_writes(in_home):
    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words],
            cwd=in_home.root, check=True, capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip

    def tags():
        with tracking.run("student", **GIVEN) as run:
            pass
        return in_home.client.get_run(run.id).data.tags

    git("init")
    (in_home.root / ".gitignore").write_text(".kd\n")
    git("add", ".")
    git("commit", "-m", "all")
    append_line(in_home.root / "dvc.lock")
    assert tags()["git.commit"] == git("rev-parse", "HEAD")
    assert tags()["git.dirty"] == "false"
    append_line(in_home.root / "dvc.yaml")
    assert tags()["git.dirty"] == "true"


def test_an_exception_ends_the_run_failed_and_says_why(in_home):
    process = spawn("bad", "raise")
    run = ended(in_home, run_id_of(process))
    assert "loss is nan at step 7" in finish(process)
    assert run.info.status == "FAILED"
    assert run.data.tags["kd.end_reason"] == "ValueError: loss is nan at step 7"


@pytest.fixture
def short_temporary(in_home, monkeypatch):
    """A folder for temporary files whose path leaves room for a socket's, which is limited."""
    before = set(find_recorders(in_home.root))
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setenv("KD_RECORDER_IDLE", "0.5")
        yield Path(folder)
        eventually(lambda: set(find_recorders(in_home.root)) <= before)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_a_killed_process_leaves_no_run_running(in_home, sent, short_temporary):
    process = spawn("killed", "wait")
    run_id = run_id_of(process)
    assert in_home.client.get_run(run_id).info.status == "RUNNING"
    process.send_signal(sent)
    finish(process)
    assert process.returncode != 0
    run = ended(in_home, run_id)
    assert run.info.status == "KILLED"
    assert run.data.tags["kd.end_reason"]
    assert run.data.metrics["val_accuracy"] == 0.75
    assert not list(short_temporary.glob("kd-run-*"))


def test_a_stopped_stage_names_the_signal(in_home):
    told = SystemExit(128 + signal.SIGTERM)  # as kd/signals.py raises it
    with pytest.raises(SystemExit), tracking.run("student", **GIVEN) as run:
        raise told
    stopped = in_home.client.get_run(run.id)
    assert stopped.info.status == "KILLED"
    assert stopped.data.tags["kd.end_reason"] == "stopped by SIGTERM"


def test_a_file_that_is_not_there_is_said_at_once(in_home):
    with (
        pytest.raises(FileNotFoundError, match=r"model\.pte"),
        tracking.run("exports", "executorch", **GIVEN) as run,
    ):
        run.log_file("model.pte")


def test_children_stand_below_their_parent(in_home, monkeypatch):
    with tracking.run("pipeline", **GIVEN) as parent:
        monkeypatch.setenv("KD_PARENT_RUN", parent.id)
        with tracking.run("student", **GIVEN) as child:
            pass
    assert in_home.client.get_run(child.id).data.tags["mlflow.parentRunId"] == parent.id


def test_a_run_that_is_not_tracked_takes_every_call_and_touches_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with tracking.run("student", **GIVEN, enabled=False) as run:
        run.log_epoch(1, {"loss": 1.0})
        run.log_final({"loss": 1.0})
        run.log_curve({1: {"loss": 1.0}})
        run.log_tags({"a": "b"})
        run.log_file("missing")
        run.log_figure(None, "nothing")
        run.log_model("x", registered_name="y", val_accuracy=0, val_hash="", example=np.zeros(2))
        assert (run.id, run.url, run.error) == (None, None, None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://127.0.0.1:9", "http://127.0.0.1:9"),
        ("http://192.0.2.1:5000", "http://192.0.2.1:5000"),
        ("postgresql+psycopg2://me:secret@127.0.0.1:9/db", "postgresql.psycopg2://127.0.0.1:9/db"),
    ],
)
def test_an_unreachable_server_fails_at_once_and_names_the_remedy(uri, shown, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    began = time.monotonic()
    with (
        pytest.raises(ConfigError, match=f"MLflow at {shown} cannot be used.*tracking: false"),
        tracking.run("student", **GIVEN),
    ):
        pytest.fail("the stage must not begin")
    assert time.monotonic() - began < 30


def test_a_store_that_cannot_be_written_fails_at_once(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/file/mlflow.db")
    with pytest.raises(ConfigError, match="cannot be used"):
        tracking.prepare_store()


def test_the_store_is_the_repositorys_wherever_one_stands(in_home, monkeypatch):
    inside = in_home.root / "deep" / "inside"
    inside.mkdir(parents=True)
    at_root = tracking.tracking_uri()
    monkeypatch.chdir(inside)
    assert tracking.tracking_uri() == at_root == f"sqlite:///{in_home.root}/.kd/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///own.db")
    assert tracking.tracking_uri() == f"sqlite:///{in_home.root}/own.db"


@pytest.fixture
def search(tmp_path):
    """What the weights stage leaves behind: three members, a search of five generations."""
    from safetensors.numpy import save_file

    members = ["small", "medium", "large"]
    random = np.random.default_rng(0)
    labels_N = random.integers(0, 4, 60)
    logits_KNC = random.normal(size=(3, 60, 4)).astype(np.float32)
    save_file(
        {"logits_KNC": logits_KNC, "labels_N": labels_N}, tmp_path / "val_logits.safetensors"
    )
    found = dict(zip(members, [0.5, 0.3, 0.2], strict=True))
    scores = {"val_nll": 0.9, "held_out_nll": 1.0, "held_out_accuracy": 0.8, "evaluations": 300}
    record = {
        "members": members,
        "weights": found,
        "weighting": {"kind": "differential_evolution", "objective": "nll"},
        "num_val": 60,
        "sets": {
            "chosen": {"weights": found, **scores, "gap": 1e-6},
            "uniform": {"weights": dict.fromkeys(members, 1 / 3), **scores, "gap": None},
        },
        "gain": {"over_uniform": {"nll": 0.01, "nll_se": 0.02}},
    }
    (tmp_path / "weights.json").write_text(json.dumps(record))
    (tmp_path / "convergence.csv").write_text(
        "generation,evaluations,best,median,worst\n"
        + "".join(f"{g},{60 * g},{1 - g / 10},{2 - g / 10},{3 - g / 10}\n" for g in range(5))
    )
    (tmp_path / "path.csv").write_text(
        "generation,small,medium,large\n" + "".join(f"{g},0.4,0.4,0.2\n" for g in range(5))
    )
    (tmp_path / "tried.csv").write_text("small,medium,large,value\n0.4,0.4,0.2,1.0\n")
    (tmp_path / "study.log").write_text("journal")
    return tmp_path


def test_every_weight_set_is_a_run_with_its_weights_search_and_figures(in_home, search):
    with tracking.run("weights", **GIVEN) as run:
        log_weight_sets(run, search, search / "study.log")
    whole = in_home.client.get_run(run.id)
    assert whole.data.metrics["gain/over_uniform.nll"] == 0.01
    assert whole.data.tags["kd.optuna_dashboard"].startswith("optuna-dashboard /")
    best = in_home.client.get_metric_history(run.id, "search/best")
    assert [point.value for point in best] == [1 - g / 10 for g in range(5)]
    path = in_home.client.get_metric_history(run.id, "weight/small")
    assert [point.value for point in path] == [0.4, 0.4, 0.4, 0.4, 0.4, 0.5]
    assert whole.data.metrics["weight/small"] == 0.5, "the weights chosen, not the search's last"
    pictures = {file.path for file in in_home.client.list_artifacts(run.id, "figures")}
    assert pictures == {
        f"figures/{name}.png" for name in ("weights", "convergence", "weights_path", "simplex")
    }
    kept = {file.path for file in in_home.client.list_artifacts(run.id)}
    assert kept >= {"weights.json", "convergence.csv", "path.csv", "tried.csv", "study"}
    sets = in_home.client.search_runs(["1"], f"tags.`mlflow.parentRunId` = '{run.id}'")
    by_name = {one.info.run_name: one.data for one in sets}
    assert set(by_name) == {"weights/chosen", "weights/uniform"}
    assert all(one.tags["kd.role"] == "student" for one in by_name.values()), "GIVEN's"
    assert by_name["weights/chosen"].metrics["weight/medium"] == 0.3
    assert by_name["weights/chosen"].metrics["gap"] == 1e-6
    assert by_name["weights/chosen"].params["weighting.objective"] == "nll"
    assert "gap" not in by_name["weights/uniform"].metrics
    assert by_name["weights/uniform"].params["weighting.kind"] == "uniform"


def test_weights_that_were_not_searched_link_to_no_study(in_home, search):
    with tracking.run("weights", **GIVEN) as run:
        log_weight_sets(run, search, None)
    whole = in_home.client.get_run(run.id)
    assert whole.info.status == "FINISHED"
    assert "kd.optuna_dashboard" not in whole.data.tags


def save_student(folder: Path, seed: int) -> np.ndarray:
    """A small network and its manifest; the logits of two images of 2s, by the network itself."""
    import torch

    from kd import manifest
    from kd.models import PlainCNN, build_model

    torch.manual_seed(seed)
    model = build_model(PlainCNN(depth=2), channels=1, image_size=8, num_classes=3).eval()
    folder.mkdir()
    manifest.save(
        folder,
        model,
        manifest.Manifest(
            name="student", role="student", model={"kind": "plain_cnn", "depth": 2},
            channels=1, image_size=8, class_names=("a", "b", "c"), mean=(0.5,), std=(0.25,),
            data_hash="d", teachers=(), weights_K=(), mixing="probabilities", method=None,
            recipe={}, seed=seed, code="", device="cpu",
        ),
    )  # fmt: skip
    with torch.no_grad():
        return model(torch.full((2, 1, 8, 8), (2 / 255 - 0.5) / 0.25)).numpy()


def register(folder: Path, accuracy: float) -> str:
    """Log a student in a run of its own, as the student stage does."""
    example = np.full((2, 8, 8, 1), 2, np.uint8)
    with tracking.run("student", **GIVEN) as run:
        run.log_model(
            folder,
            registered_name="kd-test",
            val_accuracy=accuracy,
            val_hash="v1",
            example=example,
        )
        assert run.registered("kd-test", sha256_of(folder))
    assert run.error is None
    return run.id


def sha256_of(folder: Path) -> str:
    return json.loads((folder / "manifest.json").read_text())["sha256"]


def test_the_registry_keeps_one_version_a_student_and_notes_who_won_over_whom(in_home, tmp_path):
    logits_NC = save_student(tmp_path / "s1", 1)
    save_student(tmp_path / "s2", 2)

    def aliases():
        found = in_home.client.get_registered_model("kd-test").aliases
        return {alias: str(number) for alias, number in found.items()}

    with tracking.run("student", **GIVEN) as run:
        assert run.champion("kd-test") is None, "there is not even a model of that name"
    register(tmp_path / "s1", 0.90)
    register(tmp_path / "s1", 0.90)
    assert len(in_home.client.search_model_versions("name = 'kd-test'")) == 1
    last = register(tmp_path / "s2", 0.91)
    with tracking.run("student", **GIVEN, resume=True) as run:
        assert run.id == last
        one, two = (run.registered("kd-test", sha256_of(tmp_path / s)) for s in ("s1", "s2"))
        assert run.champion("kd-test") is None
        assert run.promote("kd-test", one, None, "champion: first", True)
        assert aliases() == {"challenger": "1", "champion": "1"}
        assert not run.promote("kd-test", two, None, "champion: first", True), "there is one now"
        assert run.promote("kd-test", two, one, "challenger: no better", False)
        assert aliases() == {"challenger": "2", "champion": "1"}
        assert run.champion("kd-test") == run.registered("kd-test", one.sha256)
        brought = run.fetch(one.uri, tmp_path / "brought")
        for name in ("model.safetensors", "manifest.json"):
            assert (brought / name).read_bytes() == (tmp_path / "s1" / name).read_bytes()
    assert in_home.client.get_model_version("kd-test", "2").tags["kd.decision"] == (
        "challenger: no better"
    )
    assert in_home.client.get_run(last).info.status == "FINISHED"

    answer = subprocess.run(
        [sys.executable, "-c", LOAD, str(in_home.root)],
        env={**os.environ, "PYTHONPATH": SOURCES, "MLFLOW_TRACKING_URI": tracking.tracking_uri()},
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    told = json.loads(answer.stdout.splitlines()[-1])
    np.testing.assert_allclose(told["logits"], logits_NC, atol=1e-6)
    assert told["signature"] == ["(-1, 8, 8, 1)", "(-1, 3)"]
    assert told["network"]
    assert not told["pickles"]


def test_the_served_student_gives_the_logits_that_were_validated_to_the_last_bit(tmp_path):
    import torch

    from kd import manifest
    from kd.data import Images
    from kd.evaluate import predict
    from kd.tracking.student import Student

    save_student(tmp_path / "student", 1)
    pixels_NHWC = torch.randint(0, 256, (64, 8, 8, 1), dtype=torch.uint8)
    model, described = manifest.load(tmp_path / "student")
    normalised = {"mean": described.mean, "std": described.std}
    val = Images(pixels_NHWC=pixels_NHWC, labels_N=torch.zeros(64).long(), **normalised)
    served = Student(tmp_path / "student")
    np.testing.assert_array_equal(served.predict(pixels_NHWC.numpy()), predict(model, val))
    for wrong in (pixels_NHWC.float(), pixels_NHWC[0], pixels_NHWC.transpose(1, 3)):
        with pytest.raises(ValueError, match=r"images are .* must be uint8 \('N', 8, 8, 1\)"):
            served.predict(wrong.numpy())


def test_where_there_is_no_run_to_resume_a_new_one_begins(in_home):
    tags = {"kd.sha256": "never seen"}
    with tracking.run("student", params={}, tags=tags, resume=True) as new:
        assert new.id
    with tracking.run("student", params={}, tags=tags, resume=True) as again:
        assert again.id == new.id
    assert in_home.client.get_run(new.id).info.status == "FINISHED"


def test_a_question_that_has_no_answer_is_an_error_there(in_home, tmp_path):
    with (
        tracking.run("student", **GIVEN) as run,
        pytest.raises(ConfigError, match=r"cannot be used: fetch: .*m-none"),
    ):
        run.fetch("models:/m-none", tmp_path)
    assert run.error is None, "the record goes on"


LOAD = """
import json, sys
from pathlib import Path
import mlflow, numpy, torch
model = mlflow.pyfunc.load_model("models:/kd-test/1")
example = model.input_example
folder = Path(sys.argv[1], ".kd", "mlruns")
print(json.dumps({
    "logits": model.predict(example).tolist(),
    "network": isinstance(model.get_raw_model(), torch.nn.Module),
    "signature": [
        str(schema.inputs[0].shape)
        for schema in (model.metadata.signature.inputs, model.metadata.signature.outputs)
    ],
    "pickles": [str(p) for s in ("pkl", "pickle", "pth") for p in folder.rglob("*." + s)],
}))
"""


def test_training_outlives_its_recorder_and_a_later_start_ends_the_open_run(
    in_home, caplog, monkeypatch
):
    process = spawn("orphan", "wait")
    orphan = run_id_of(process)
    (serving,) = find_recorders(in_home.root)
    with tracking.run("student", **GIVEN) as run:
        survivor = run.id
        os.kill(serving, signal.SIGKILL)
        eventually(lambda: not find_recorders(in_home.root))
        for epoch in range(50):
            run.log_epoch(epoch, {"val_nll": 1.0})
    assert run.error
    assert "no longer records" in caplog.text
    process.kill()
    finish(process)
    assert in_home.client.get_run(orphan).info.status == "RUNNING"
    monkeypatch.setenv("KD_RECORDER_IDLE", "0.5")
    with tracking.run("student", **GIVEN) as run:
        assert run.id
    reaped = in_home.client.get_run(orphan)
    assert reaped.info.status == "KILLED"
    assert "is gone" in reaped.data.tags["kd.end_reason"]
    assert in_home.client.get_run(survivor).info.status == "RUNNING", "its process lives"
    in_home.client.set_terminated(survivor)
    eventually(lambda: not find_recorders(in_home.root))


def find_recorders(root: Path) -> list[int]:
    """Process ids of the recorders that serve a repository."""
    import psutil

    return [
        process.pid
        for process in psutil.process_iter(["cmdline", "status"])
        if process.info["cmdline"]
        and process.info["cmdline"][1:3] == ["-m", "kd.tracking"]
        and process.info["cmdline"][-1] == str(root)
        and process.info["status"] != psutil.STATUS_ZOMBIE
    ]


def test_a_recorder_that_cannot_start_says_why_at_the_first_call(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KD_RECORDER_IDLE", "0.2")
    (tmp_path / ".kd").mkdir()
    (tmp_path / ".kd" / "mlflow.db").write_text("no database at all, but long enough to be read")
    with (
        pytest.raises(ConfigError, match=r"not a database.*tracking: false"),
        tracking.run("teacher", **GIVEN) as run,
    ):
        run.log_epoch(1, {"val_nll": 1.0})
    eventually(lambda: not find_recorders(tmp_path))


def test_a_recorder_that_ends_at_once_is_told_with_its_last_words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / "socket.py").write_text("raise ImportError('mine')")  # taken for Python's own
    told = r"its recorder exited at once with status 1 \(ImportError: mine; see .*tracking: false"
    with pytest.raises(TrackingError, match=told):
        tracking.start()


def test_a_temporary_folder_whose_path_is_too_long_for_a_socket_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    long = tmp_path / ("long" * 25)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    with pytest.raises(TrackingError, match="set TMPDIR to a shorter"):
        tracking.start()


@pytest.mark.slow
def test_eight_processes_that_make_one_stores_tables_all_succeed(tmp_path):
    code = (
        "import sys; from pathlib import Path; from kd.tracking.store import make_tables, Store; "
        "make_tables(Path(sys.argv[1])); "
        "Store('sqlite:///' + sys.argv[1], Path(sys.argv[2])).client.search_experiments()"
    )
    database = tmp_path / "mlflow.db"
    database.touch()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(database), str(tmp_path)],
            env={**os.environ, "PYTHONPATH": SOURCES},
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(8)
    ]
    said = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 8, said


def answers(port: int) -> bool:
    with socket.socket() as knock:
        return knock.connect_ex(("127.0.0.1", port)) == 0


def test_a_failure_in_mid_run_is_reported_and_the_run_ends(in_home):
    with tracking.run("student", **GIVEN) as run:
        run.log_final({"a name that MLflow refuses: *": 1.0})
    assert "metrics: MlflowException: Invalid" in run.error
    assert in_home.client.get_run(run.id).info.status == "FINISHED"


@pytest.mark.slow
def test_a_server_of_ones_own_holds_the_runs_and_their_files(tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1",
         "--backend-store-uri", f"sqlite:///{tmp_path}/server.db",
         "--artifacts-destination", str(tmp_path / "files")],
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        monkeypatch.setenv("KD_RECORDER_IDLE", "2")
        monkeypatch.setenv("KD_RECORDER_OUTAGE", "1")
        eventually(lambda: answers(port), 180)
        save_student(tmp_path / "student", 1)
        run_id = register(tmp_path / "student", 0.9)
        import mlflow

        client = mlflow.MlflowClient(uri)
        assert client.get_run(run_id).info.status == "FINISHED"
        with tracking.run("student", **GIVEN, resume=True) as run:
            version = run.registered("kd-test", sha256_of(tmp_path / "student"))
            assert run.promote("kd-test", version, None, "champion: first", True)
            brought = run.fetch(version.uri, tmp_path / "brought")
        assert sha256_of(brought) == version.sha256
        assert client.get_model_version_by_alias("kd-test", "champion").version == "1"
        with tracking.run("student", **GIVEN) as run:
            assert run.url.startswith(f"{uri}/#/experiments/1/runs/{run.id}")
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
            run.log_epoch(1, {"val_nll": 1.0})
        assert run.error.startswith("metrics: MlflowException: API request"), run.error
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
