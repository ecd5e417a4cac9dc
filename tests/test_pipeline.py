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

import pytest
import yaml

from kd import artifacts, params, stages
from kd.exporters import ExecuTorch, Onnx
from kd.tracking import NullRun

PROJECT = Path(__file__).parents[1]
SHORT = {"tracking": False, "recipe.epochs": 3, "report.latency_seconds": 0.1}


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


def kd(folder, *arguments, **settings):
    """Run one stage as DVC does: a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    return subprocess.run(
        [sys.executable, "-m", "kd", *arguments],
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
        run_stages(["exports@onnx", "exports@executorch", "report"])
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


def test_the_pools_labels_are_nowhere(finished):
    import numpy as np

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


@pytest.mark.parametrize("stage", ["teacher", "student"])
def test_a_stage_killed_in_mid_training_goes_on_to_the_same_bytes(finished, tmp_path, stage):
    shutil.copytree(finished / "artifacts", tmp_path / "artifacts")
    experiment(tmp_path)
    target = tmp_path / "artifacts" / stage
    shutil.rmtree(target)
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    training = subprocess.Popen(
        [sys.executable, "-m", "kd", stage], cwd=tmp_path, env=environment, stdout=subprocess.PIPE
    )
    assert training.stdout is not None
    first = training.stdout.readline()
    assert b"epoch 1/3" in first
    checkpoints = tmp_path / ".kd/checkpoints" / stage
    until = time.monotonic() + 60
    while not list(checkpoints.glob("*.safetensors")) and time.monotonic() < until:
        training.send_signal(signal.SIGCONT)  # in short steps, so that it cannot end meanwhile
        time.sleep(0.02)
        training.send_signal(signal.SIGSTOP)
    training.send_signal(signal.SIGKILL)
    training.wait()
    training.stdout.close()
    assert not (target / "model.safetensors").exists()
    done = kd(tmp_path, stage)
    assert done.returncode == 0, done.stderr
    assert "epoch 1/3" not in done.stdout
    assert same_files(target, finished / "artifacts" / stage) == []
    assert list(checkpoints.glob("*.safetensors")) == []


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
    ],
    ids=["value", "order", "name", "folder", "model"],
)
def test_bad_input_ends_with_status_2_and_one_clear_line(tmp_path, changes, arguments, said):
    experiment(tmp_path, **changes)
    done = kd(tmp_path, *arguments)
    assert done.returncode == 2, done.stderr
    assert re.search(said, done.stderr)
    assert "Traceback" not in done.stderr
