"""The whole path on the real embedded images, through the real processes."""

import filecmp
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from kd import artifacts, lineage, params, stages
from kd.bundle import checksums
from kd.component import ConfigError
from kd.exporters import ExecuTorch, Int8, Onnx
from kd.figures import read_rows
from kd.qat import gentle
from kd.recipe import Recipe
from kd.tracking import NullRun
from tests.bundle.toys import outsider
from tests.data.toys import make_pictures

PROJECT = Path(__file__).parents[1]
SHORT = {
    "tracking": False,
    "recipe.device": "cpu",  # also where there is a GPU: two devices must be had
    "recipe.epochs": 3,
    "recipe.checkpoint_steps": 5,
    "report.latency_seconds": 0.1,
}


def experiment(folder, **changes):
    """Write a params.yaml like the project's own, with some keys changed by their path."""
    raw = yaml.safe_load((PROJECT / "params.yaml").read_text())
    for path, value in (SHORT | changes).items():
        *parents, last = path.split(".")
        section = raw
        for key in parents:
            section = section[key]
        section[last] = value
    (folder / "params.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))


def kd(folder, *arguments, module="kd", **settings):
    """Run one stage as DVC does: a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        **settings,
    )


def run_stages(names):
    read = params.load()
    for each in names:
        stage, _, name = each.partition("@")
        stages.STAGES[stage](read, name, NullRun())


def test_an_experiment_is_checked_without_running_anything(tmp_path):
    experiment(tmp_path)
    good = kd(tmp_path, "check")
    assert (good.returncode, good.stdout, good.stderr) == (0, "params.yaml: OK\n", "")
    experiment(tmp_path, **{"assistants.large.taught_by": "techer"})
    bad = kd(tmp_path, "check")
    assert bad.returncode == 2
    assert bad.stderr.startswith("error: params.yaml: assistants.large.taught_by is 'techer'; ")
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]


def test_what_a_key_made_that_is_gone_is_named_by_a_check(tmp_path):
    experiment(tmp_path)
    stray = tmp_path / "artifacts/exports/gone/model.onnx"
    stray.parent.mkdir(parents=True)
    stray.touch()
    checked = kd(tmp_path, "check")
    assert checked.returncode == 2
    assert checked.stderr.startswith("error: artifacts/exports/gone belongs to no key of ")
    assert stray.exists()


TRAINED = ["teacher", "assistants@small", "assistants@medium", "assistants@large"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A workspace in which every stage has run."""
    folder = tmp_path_factory.mktemp("finished")
    experiment(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_stages(["data", *TRAINED, "weights", "student"])
        run_stages(f"baselines@{name}" for name in params.load().baselines)
        run_stages(f"exports@{name}" for name in params.load().exports)
        run_stages(["report"])
    return folder


def test_every_network_of_the_experiment_is_in_the_report(finished):
    record = json.loads((finished / "artifacts/report/report.json").read_text())
    rows = {row["name"]: row for row in record["rows"]}
    assert list(rows) == [
        "teacher",
        "assistants/large",
        "assistants/medium",
        "assistants/small",
        "ensemble/uniform",
        "ensemble/weighted",
        "student",
        "baselines/labels",
        "baselines/teacher",
        "baselines/best_single",
        "baselines/uniform",
    ]
    assert record["num_test"] == 359
    assert all(0.2 < row["test_accuracy"] <= 1 for row in rows.values())  # chance is 0.1
    assert rows["teacher"]["parameters"] > 100 * rows["student"]["parameters"]
    markdown = (finished / "artifacts/report/report.md").read_text()
    assert all(name in markdown for name in rows)


def test_the_reliability_diagram_is_what_the_calibration_error_is_made_of(finished):
    folder = finished / "artifacts/report"
    record = json.loads((folder / "report.json").read_text())
    bins = read_rows(folder / "reliability.csv")
    gaps = [each["count"] * abs(each["accuracy"] - each["confidence"]) for each in bins]
    (student,) = [row for row in record["rows"] if row["name"] == "student"]
    assert sum(gaps) / record["num_test"] == pytest.approx(student["test_ece"], rel=1e-12)


def test_latency_is_measured_for_every_network_and_file(finished):
    latency = json.loads((finished / "artifacts/report/latency.json").read_text())
    assert {"teacher", "student", "exports/onnx", "exports/executorch"} <= set(latency)
    assert all(milliseconds > 0 for milliseconds in latency.values())


def test_the_student_knows_who_taught_it(finished):
    manifest = json.loads((finished / "artifacts/student/manifest.json").read_text())
    weights = json.loads((finished / "artifacts/weights/weights.json").read_text())
    assert [t["name"] for t in manifest["teachers"]] == [
        f"assistants/{name}" for name in weights["members"]
    ]
    assert manifest["weights_K"] == list(weights["weights"].values())
    assert sum(manifest["weights_K"]) == pytest.approx(1)
    for teacher in manifest["teachers"]:
        path = finished / "artifacts" / teacher["name"] / "model.safetensors"
        assert artifacts.sha256(path) == teacher["sha256"]


def test_a_students_file_holds_the_student_alone(finished):
    sizes = {
        name: (finished / f"artifacts/{name}/model.safetensors").stat().st_size
        for name in ("student", "baselines/labels", "assistants/small")
    }
    assert sizes["student"] == sizes["baselines/labels"] < sizes["assistants/small"]


def test_student_and_baselines_start_alike_and_spend_the_same(finished):
    records = [
        json.loads((finished / f"artifacts/{name}/{file}.json").read_text())
        for file in ("manifest", "metrics")
        for name in ("student", "baselines/labels", "baselines/teacher", "baselines/uniform")
    ]
    assert len({record["seed"] for record in records[:4]}) == 1
    assert len({record["samples_seen"] for record in records[4:]}) == 1


@pytest.mark.parametrize("exporter", [ExecuTorch(), Onnx()], ids=lambda e: e.kind)
def test_the_published_files_run_in_their_own_runtimes(finished, exporter):
    folder = finished / f"artifacts/exports/{exporter.kind}"
    parity = json.loads((folder / "parity.json").read_text())
    assert parity["top1_agreement"] == 1.0
    assert parity["num_images"] == 359
    import torch

    logits = exporter.load(folder / f"model{exporter.suffix}")(torch.zeros(3, 1, 16, 16))
    assert logits.shape == (3, 10)


@pytest.mark.slow
def test_int8_that_loses_too_much_is_fine_tuned_under_the_same_teachers(finished, tmp_path):
    shutil.copytree(finished / "artifacts", tmp_path / "artifacts")
    int8 = {"calibration_images": 1, "qat_when_loss_above": -0.0, "qat_epochs": 1}
    anything = {"top1_agreement": 0.0, "accuracy_points": 100.0, "sqnr_db": -99.0}
    given = {"kind": "onnx", "precision": "int8", "int8": int8, "tolerance": anything}
    experiment(tmp_path, **{"exports.onnx_int8": given})
    done = kd(tmp_path, "exports", "onnx_int8")  # one picture says too little of the ranges
    assert done.returncode == 0, done.stderr
    assert "fine-tuning" in done.stdout
    parity = json.loads((tmp_path / "artifacts/exports/onnx_int8/parity.json").read_text())
    figures = {each: parity[f"{each}_val_accuracy"] for each in ("ptq", "qat")}
    assert parity["val_accuracy"] == figures[parity["chosen"]] == max(figures.values())
    again = kd(tmp_path, "exports", "onnx_int8")
    assert again.returncode == 0, again.stderr
    path = tmp_path / "artifacts/exports/onnx_int8/parity.json"
    assert json.loads(path.read_text()) == parity


def test_fine_tuning_in_int8_takes_one_device():
    assert gentle(Recipe(devices=2), Int8()).devices == 1


def test_a_refused_export_ends_with_status_1_and_leaves_nothing(finished, tmp_path):
    shutil.copytree(finished / "artifacts", tmp_path / "artifacts")
    exact = {"kind": "onnx", "tolerance": {"relative": 0.0}}
    experiment(tmp_path, **{"exports.onnx": exact})
    done = kd(tmp_path, "exports", "onnx")
    assert done.returncode == 1
    assert re.search(
        r"model.onnx .* outside of tolerance: relative may be at most 0 ", done.stderr
    )
    assert not list((tmp_path / "artifacts/exports/onnx").iterdir())


def test_an_outsider_classifies_the_validation_images_as_well_as_the_card_says(finished, tmp_path):
    folder, val = finished / "artifacts/exports/onnx", finished / "artifacts/data/val"
    found = outsider(folder, val / "images.npy", "kd,torch,mlflow")
    card = (folder / "MODEL_CARD.md").read_text()
    right = np.mean(found["index"] == np.load(val / "labels.npy"))
    assert f"| accuracy | {right:.4f} ± " in card
    assert right > 0.5
    checksums.check(folder)


def test_an_exported_file_leads_back_to_the_teacher(finished, monkeypatch):
    monkeypatch.chdir(finished)
    said = lineage.tell(Path("artifacts/exports/onnx/model.onnx"))
    assert said.count("1.0000 x teacher") == 3
    assert "not here" not in said


def test_the_pools_labels_are_nowhere(finished):
    labels = np.load(finished / "artifacts/data/pool/labels.npy")
    assert len(labels) > 900
    assert set(labels) == {-1}


def same_files(one, other, ignore=()):
    """Files below `one` that are missing below `other`, or differ there."""
    files = [p.relative_to(one) for p in one.rglob("*") if p.is_file()]
    assert files
    return [
        str(p)
        for p in files
        if p.name not in ignore
        and not ((other / p).exists() and filecmp.cmp(one / p, other / p, shallow=False))
    ]


def test_stages_in_processes_of_their_own_make_the_same_bytes(finished, tmp_path):
    experiment(tmp_path)
    for stage in (["data"], ["teacher"], ["assistants", "small"]):
        done = kd(tmp_path, *stage)
        assert done.returncode == 0, done.stderr
    for name in ("large", "medium"):
        source = finished / "artifacts/assistants" / name
        shutil.copytree(source, tmp_path / "artifacts/assistants" / name)
    done = kd(tmp_path, "weights")
    assert done.returncode == 0, done.stderr
    for folder in ("data", "teacher", "assistants/small", "weights"):
        assert same_files(tmp_path / "artifacts" / folder, finished / "artifacts" / folder) == []


WEIGHTINGS = [
    {"kind": "uniform"},
    {"kind": "best_single"},
    {"kind": "greedy"},
    {"kind": "expectation_maximization"},
    {"kind": "fixed", "weights": {"small": 0.5, "medium": 0.25, "large": 0.25}},
    {"kind": "differential_evolution", "study": False},
]


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=lambda weighting: weighting["kind"])
def test_every_weighting_leaves_all_that_dvc_expects(finished, tmp_path, monkeypatch, weighting):
    experiment(tmp_path, weights=weighting)
    for folder in ("data", "assistants"):
        shutil.copytree(finished / "artifacts" / folder, tmp_path / "artifacts" / folder)
    monkeypatch.chdir(tmp_path)
    run_stages(["weights"])
    stage = yaml.safe_load((PROJECT / "dvc.yaml").read_text())["stages"]["weights"]
    expected = [
        *stage["outs"],
        *stage["metrics"],
        *(each for plot in stage["plots"] for each in plot),
    ]
    recorded = "artifacts/runs/weights.json"  # by kd/__main__.py
    assert [path for path in expected if not Path(path).exists()] in ([], [recorded])


def killed_after(saves: int, folder: Path, *stage: str) -> None:
    """Start a stage, and kill it once it has saved its state so many times."""
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    training = subprocess.Popen(
        [sys.executable, "-m", "kd", *stage], cwd=folder, env=environment, stdout=subprocess.PIPE
    )
    checkpoints = folder / ".kd/checkpoints" / Path(*stage)
    seen: set[int] = set()
    until = time.monotonic() + 120
    while len(seen) < saves and training.poll() is None and time.monotonic() < until:
        training.send_signal(signal.SIGCONT)  # in short steps, so that it cannot end meanwhile
        time.sleep(0.01)
        training.send_signal(signal.SIGSTOP)
        seen |= {path.stat().st_mtime_ns for path in checkpoints.glob("[!.]*")}
    training.send_signal(signal.SIGKILL)
    assert training.wait() == -signal.SIGKILL
    assert training.stdout is not None
    training.stdout.close()


@pytest.mark.parametrize(
    ("saves", "stage"), [(1, ["teacher"]), (2, ["student"]), (3, ["assistants", "small"])]
)
def test_a_stage_killed_in_mid_training_goes_on_to_the_same_bytes(
    finished, tmp_path, saves, stage
):
    shutil.copytree(finished / "artifacts", tmp_path / "artifacts")
    experiment(tmp_path)
    target = tmp_path / "artifacts" / Path(*stage)
    shutil.rmtree(target)
    killed_after(saves, tmp_path, *stage)
    assert not (target / "model.safetensors").exists()
    checkpoints = tmp_path / ".kd/checkpoints" / Path(*stage)
    assert list(checkpoints.glob("*.safetensors"))
    done = kd(tmp_path, *stage)
    assert done.returncode == 0, done.stderr
    assert same_files(target, finished / "artifacts" / Path(*stage)) == []
    assert list(checkpoints.iterdir()) == []


@pytest.mark.slow
def test_a_weight_search_killed_and_cleared_by_dvc_goes_on_to_the_same_bytes(finished, tmp_path):
    long = {"kind": "differential_evolution", "generations": 400, "tolerance": 0.0}
    for folder in ("whole", "killed"):
        for made in ("data", "assistants"):
            shutil.copytree(finished / "artifacts" / made, tmp_path / folder / "artifacts" / made)
        experiment(tmp_path / folder, weights=long)
    whole, killed = tmp_path / "whole/artifacts", tmp_path / "killed/artifacts"
    assert kd(whole.parent, "weights").returncode == 0
    killed_after(20, killed.parent, "weights")
    [study] = (killed.parent / ".kd/checkpoints/weights").iterdir()
    begun = study.read_bytes()
    assert not (killed / "weights/weights.json").exists()
    assert not (killed / "runs/weights.study.log").exists()
    shutil.rmtree(killed / "weights")  # as DVC does before it runs a stage
    done = kd(killed.parent, "weights")
    assert done.returncode == 0, done.stderr
    assert same_files(killed / "weights", whole / "weights") == []
    studies = [(each / "runs/weights.study.log").read_bytes() for each in (killed, whole)]
    generations = [each.count(b"\n") // 20 for each in (begun, *studies)]
    assert 10 < generations[0] < generations[1]
    assert studies[0].startswith(begun[: begun.rindex(b"\n") + 1])
    assert not study.exists()


def test_a_stage_that_is_told_to_end_saves_its_step_and_goes_on_from_it(finished, tmp_path):
    shutil.copytree(finished / "artifacts", tmp_path / "artifacts")
    experiment(tmp_path)
    shutil.rmtree(tmp_path / "artifacts/teacher")
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    training = subprocess.Popen(
        [sys.executable, "-m", "kd", "teacher"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert training.stdout is not None
    assert "epoch 1/3" in training.stdout.readline()
    training.send_signal(signal.SIGTERM)
    rest = training.communicate(timeout=60)[0]
    assert training.returncode == 128 + signal.SIGTERM
    assert "stopped after step" in rest
    done = kd(tmp_path, "teacher")
    assert done.returncode == 0, done.stderr
    assert "epoch 1/3" not in done.stdout
    assert same_files(tmp_path / "artifacts/teacher", finished / "artifacts/teacher") == []


def test_what_is_left_to_the_machine_is_measured_once_and_recorded(finished, tmp_path):
    shutil.copytree(finished / "artifacts/data", tmp_path / "artifacts/data")
    left = {"precision": "auto", "memory_format": "auto"}
    experiment(tmp_path, **{"teacher.recipe": left})
    folder, first = tmp_path / "artifacts/teacher", tmp_path / "first"
    for _ in range(2):
        done = kd(tmp_path, "teacher")
        assert done.returncode == 0, done.stderr
        assert "as measured on this machine" in done.stdout
        recorded = json.loads((folder / "manifest.json").read_text())["recipe"]
        assert recorded["precision"] in ("fp32", "bf16")
        assert recorded["memory_format"] in ("channels_last", "contiguous")
        if not first.exists():
            folder.rename(first)
    assert len(list((tmp_path / ".kd/machine/speed").glob("*.json"))) == 1
    assert same_files(first, folder) == []


@pytest.mark.slow
def test_two_devices_train_what_one_trains(finished, tmp_path):
    shutil.copytree(finished / "artifacts", tmp_path / "artifacts")
    experiment(tmp_path, **{"recipe.devices": 2})
    done = kd(tmp_path, "assistants", "small")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 3/3") == 1  # one of the two tells
    folder = "artifacts/assistants/small"
    ours, theirs = (
        json.loads((root / folder / "metrics.json").read_text()) for root in (tmp_path, finished)
    )
    assert ours["val_nll"] == pytest.approx(theirs["val_nll"], rel=0.1)
    assert ours["val_nll"] != theirs["val_nll"]  # the last bits of sums differ, and grow
    assert (tmp_path / "artifacts/runs/assistants/small.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("targets", ["online", "cached"])
def test_every_stage_that_trains_does_so_on_a_gpu(finished, tmp_path, targets):
    """A pretended one (tests/pretended_gpu.py), which computes as a CPU does."""
    shutil.copytree(finished / "artifacts/data", tmp_path / "artifacts/data")
    choices = {"precision": "auto", "memory_format": "auto", "targets": targets}
    on_gpu = {"recipe.device": "cuda"} | {f"recipe.{key}": each for key, each in choices.items()}
    experiment(tmp_path, **on_gpu)
    for stage in (*TRAINED, "weights", "student", "baselines@uniform"):
        done = kd(tmp_path, *stage.split("@"), module="tests.pretended_gpu")
        assert done.returncode == 0, done.stderr
        if stage == "weights":
            continue
        folder = Path("artifacts", stage.replace("@", "/"))
        assert json.loads((tmp_path / folder / "manifest.json").read_text())["device"] == "cuda"
        ours, theirs = (
            json.loads((root / folder / "metrics.json").read_text())
            for root in (tmp_path, finished)
        )
        assert ours["val_accuracy"] == pytest.approx(theirs["val_accuracy"], abs=0.1)


def test_a_student_is_not_trained_by_assistants_that_were_not_weighed(finished, tmp_path):
    shutil.copytree(finished / "artifacts", tmp_path / "artifacts")
    experiment(tmp_path, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        run_stages(["assistants@small"])
        for stage in ("student", "baselines@best_single"):
            with pytest.raises(artifacts.ArtifactError, match="for another assistants/small"):
                run_stages([stage])


def test_a_student_is_not_trained_by_assistants_of_another_teacher(finished, tmp_path):
    shutil.copytree(finished / "artifacts", tmp_path / "artifacts")
    experiment(tmp_path, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        run_stages(["teacher"])
        with pytest.raises(artifacts.ArtifactError, match="taught by another teacher"):
            run_stages(["student"])


def test_truncated_images_are_named_before_training(finished, tmp_path):
    shutil.copytree(finished / "artifacts/data", tmp_path / "artifacts/data")
    experiment(tmp_path)
    images = tmp_path / "artifacts/data/train/images.npy"
    images.write_bytes(images.read_bytes()[:-100])
    done = kd(tmp_path, "teacher")
    assert done.returncode == 2
    assert "holds no prepared data" in done.stderr
    assert "epoch" not in done.stdout


@pytest.mark.parametrize(
    ("changes", "arguments", "said"),
    [
        ({"student.method.temperature": -1}, ["data"], "student.method.temperature is -1"),
        ({}, ["teacher"], r"data\.json is missing: run `dvc repro data`"),
        ({}, ["assistants", "huge"], "assistants has no 'huge' in params.yaml; it has large"),
        (
            {
                "data.dataset": {"kind": "image_folder", "root": "nowhere"},
                "data.source": "nowhere",
            },
            ["data"],
            "nowhere",
        ),
        (
            {"student.model": {"kind": "torchvision", "name": "resnet_18"}, "data.channels": 3},
            ["data"],
            "resnet18",
        ),
        (
            {"student.method": {"kind": "custom", "path": "nowhere:Method"}},
            ["data"],
            r"student\.method: path 'nowhere:Method': cannot import nowhere",
        ),
        (
            {"student.model": {"kind": "custom", "path": "tests.models.toys:Tinny"}},
            ["teacher"],
            r"student\.model: path 'tests\.models\.toys:Tinny': module .* has no 'Tinny'",
        ),
        (
            {"recipe.precision": "tf32", "recipe.device": "cpu"},
            ["data"],
            r"recipe\.precision is 'tf32'; it must be fp32 or bf16 if device is cpu",
        ),
    ],
    ids=["value", "order", "name", "folder", "model", "method", "own", "precision"],
)
def test_bad_input_ends_with_status_2_and_one_clear_line(tmp_path, changes, arguments, said):
    experiment(tmp_path, **changes)
    done = kd(tmp_path, *arguments)
    assert done.returncode == 2, done.stderr
    assert re.search(said, done.stderr)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("package", "module", "arguments"),
    [
        ("torchvision", "kd", ["check"]),
        ("scipy", "kd.compare", [str(PROJECT / "params.compare.yaml")]),
    ],
)
def test_the_extra_of_a_package_that_is_not_installed_is_named(
    tmp_path, package, module, arguments
):
    experiment(tmp_path, **{
        "student.model": {"kind": "torchvision", "name": "resnet18"},
        "data.channels": 3,
    })  # fmt: skip
    (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError(name={package!r})")
    done = kd(tmp_path, *arguments, module=module)
    assert done.stderr == (
        f"error: this needs the package {package!r}, which is not installed; "
        "run: pip install 'kd[pipeline]'\n"
    )


def test_images_that_are_learned_and_tested_on_are_named(tmp_path, monkeypatch, capsys):
    root = make_pictures(tmp_path / "pictures", {"ant": 10, "bee": 10})
    experiment(tmp_path, **{
        "data.dataset": {"kind": "image_folder", "root": "pictures"},
        "data.source": "pictures",
        "data.splits": {"val": 8, "test": 6},
    })  # fmt: skip
    monkeypatch.chdir(tmp_path)
    run_stages(["data"])
    assert "warning" not in capsys.readouterr().out
    table = Path("artifacts/data/raw/files.csv").read_text().splitlines()
    files = [line.partition(",")[0] for line in table[1:]]
    learned, tested = (np.load(f"artifacts/data/{it}/indices.npy")[0] for it in ("train", "test"))
    shutil.copy(root / files[learned], root / files[tested])
    run_stages(["data"])
    said = capsys.readouterr().out.splitlines()
    assert said[1].startswith("warning: some images of test (1) are in train or pool, too")
    assert said[2:] == [f"pictures/{files[tested]} = pictures/{files[learned]}"]


def test_the_installed_program_finds_the_users_code_in_the_folder_it_is_run_in(tmp_path):
    experiment(tmp_path, **{"student.model": {"kind": "custom", "path": "mine:Net"}})
    (tmp_path / "mine.py").write_text("")
    done = subprocess.run(
        [Path(sys.executable).with_name("kd"), "data"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "path 'mine:Net': module mine has no 'Net'" in done.stderr


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"teacher.model": {"kind": "custom", "path": "tests.models.toys:no_module"}},
            "^teacher: ",
        ),
        (
            {"student.method": {"kind": "custom", "path": "kd.methods:KD", "args": {"alfa": 1}}},
            "^student: path 'kd.methods:KD' cannot be called with",
        ),
        (
            {"student.method": {"kind": "custom", "path": "kd.methods:OKDDip"}},
            r"^student: peers is \[\]; it must be from 2",
        ),
        (
            {
                "data.dataset": {"kind": "custom", "path": "tests.data.toys:Stripes"},
                "data.source": "tests/data",
                "baselines.labels": {
                    "teachers": "teacher",
                    "method": {"kind": "kd", "standardize": True},
                },
            },
            "^baselines.labels: standardize is true; it must be false with only two classes",
        ),
        (
            {"student.model": {"kind": "custom", "path": "tests.models.toys:Choosy"}},
            "must do the same steps for every image",
        ),
        (
            {
                "data.dataset": {"kind": "custom", "path": "tests.data.toys:Stripes"},
                "data.source": "tests/data",
                "data.splits": {"val": 6, "test": 6},
            },
            "^data.splits.val is 6; it must be enough for 7 images",
        ),
    ],
    ids=["model", "method", "peers", "classes", "export", "val"],
)
def test_what_cannot_learn_or_be_exported_is_found_before_anything_is_written(
    tmp_path, monkeypatch, changes, said
):
    experiment(tmp_path, **changes)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=said):
        run_stages(["data"])
    assert not Path("artifacts").exists()
