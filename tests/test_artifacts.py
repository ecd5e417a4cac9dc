import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kd import artifacts, disk
from kd.__main__ import run
from kd.artifacts import ArtifactError
from kd.component import ConfigError
from kd.train import Epoch
from kd.workspace import check_foreign
from tests.learners import network

EPOCHS = [Epoch(number=1, step=5, lr=0.1, train_loss=0.5, validation={"accuracy": 0.25})]


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_record_comes_back_as_it_was(workspace):
    record = {"b": 0.1 + 0.2, "a": [1, None, "ü"]}
    artifacts.write_json(workspace / "r.json", record)
    assert artifacts.read_json(workspace / "r.json") == record
    assert list(artifacts.read_json(workspace / "r.json")) == ["b", "a"]


def test_text_is_utf8_in_a_locale_that_is_not():
    Path("params.yaml").write_text("code: Füße", "utf-8")
    script = (
        "from pathlib import Path; from kd import artifacts, build; "
        "artifacts.write_csv(Path('out.csv'), [build.read_yaml(Path('params.yaml'))])"
    )
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment = {**os.environ, **ascii_only, "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
    assert Path("out.csv").read_text("utf-8") == "code\nFüße\n"


def test_a_record_with_nan_is_not_written(workspace):
    with pytest.raises(ValueError, match="JSON compliant"):
        artifacts.write_json(workspace / "r.json", {"loss": float("nan")})
    assert list(workspace.iterdir()) == []


def test_a_crash_while_writing_leaves_the_old_file_and_nothing_else(workspace):
    path = workspace / "file"
    path.write_text("old")

    def crash():
        with artifacts.atomic(path) as temporary:
            temporary.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        crash()
    assert path.read_text() == "old"
    assert list(workspace.iterdir()) == [path]


def test_what_a_killed_process_left_half_written_is_cleared_away(workspace):
    left_over = workspace / ".r.json.99999.tmp"
    left_over.write_text("{")
    artifacts.write_json(workspace / "r.json", {})
    assert [path.name for path in workspace.iterdir()] == ["r.json"]


def test_temporary_folders_of_killed_processes_go_and_those_of_others_stay(workspace, monkeypatch):
    script = (
        "import os, signal; from kd.disk import temporary; folder = temporary(); "
        "open(f'{folder.name}/file', 'w').close(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = {
        **os.environ,
        "TMPDIR": str(workspace),
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    subprocess.run([sys.executable, "-c", script], env=environment, check=False)
    (left_over,) = workspace.iterdir()
    monkeypatch.setattr("tempfile.tempdir", str(workspace))
    prefix, killed = left_over.name.rsplit("-", 2)[:2]
    named = (f"{prefix}-x-y", f"{prefix}-{10**30}-y", f"{prefix}-{os.getppid()}-y")
    stay = {workspace / name for name in (*named, f"kd-run-1-{killed}-in-another-container")}
    for folder in stay:
        folder.mkdir()
    with disk.temporary() as made, disk.temporary() as other:
        assert {*workspace.iterdir()} == {*stay, Path(made), Path(other)}
    assert not left_over.exists()


def test_a_full_disk_is_told_in_one_line(workspace, monkeypatch, capsys):
    """A file size limit stands for the full disk; both refuse a write in the kernel."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            artifacts.save_model(workspace / "m.safetensors", network(0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(workspace.iterdir()) == []

    def full(stage, name):
        raise OSError(errno.ENOSPC, "No space left on device", "model")

    monkeypatch.setattr("kd.__main__.run_stage", full)
    assert run(["teacher"]) == 1
    assert "error: the disk is full" in capsys.readouterr().err


def test_a_disk_with_too_little_room_is_refused_with_nothing_but_safe_advice(workspace):
    artifacts.check_space(workspace, 1)
    with pytest.raises(ArtifactError, match=r"`make clean` drops old checkpoints") as told:
        artifacts.check_space(workspace, 2**60)
    assert "gc" not in str(told.value), "it would drop what other commits name"


@pytest.mark.parametrize("text", ["{", "[1]", "\x00"])
def test_a_damaged_record_names_the_stage_to_run(text):
    path = artifacts.folder("assistants/small") / "metrics.json"
    path.write_text(text)
    with pytest.raises(ArtifactError, match=r"metrics.json .* run `dvc repro assistants@small`"):
        artifacts.read_json(path)


def test_a_missing_record_names_the_stage_to_run():
    with pytest.raises(ArtifactError, match="is missing: run `dvc repro teacher`"):
        artifacts.read_json(artifacts.folder("teacher") / "manifest.json")


def test_tensors_come_back_bit_for_bit_also_where_they_share_memory(workspace):
    base = torch.randn(4, 4)
    tensors = {"a": base, "b": base.t(), "c": base[0], "n": torch.tensor(3)}
    artifacts.write_tensors(workspace / "t.safetensors", tensors, {"k": "v"})
    read, metadata = artifacts.read_tensors(workspace / "t.safetensors")
    assert metadata == {"k": "v"}
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_a_damaged_tensor_file_is_named(workspace):
    path = workspace / "t.safetensors"
    artifacts.write_tensors(path, {"a": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ArtifactError, match=r"t\.safetensors is damaged"):
        artifacts.read_tensors(path)


def test_the_same_model_is_the_same_file(workspace):
    first = artifacts.save_model(workspace / "a.safetensors", network(0))
    assert artifacts.save_model(workspace / "b.safetensors", network(0)) == first
    assert artifacts.save_model(workspace / "c.safetensors", network(1)) != first


def test_another_models_weights_are_refused(workspace):
    artifacts.save_model(workspace / "a.safetensors", torch.nn.Linear(2, 2))
    with pytest.raises(ArtifactError, match="is for another model"):
        artifacts.load_model(workspace / "a.safetensors", network(0))


def test_a_folder_that_refuses_writes_is_told_in_one_line(workspace, monkeypatch, capsys):
    def forbidden(stage, name):
        raise PermissionError(errno.EACCES, "Permission denied", "artifacts/teacher")

    monkeypatch.setattr("kd.__main__.run_stage", forbidden)
    assert run(["teacher"]) == 1
    assert "error: [Errno 13] Permission denied: 'artifacts/teacher'" in capsys.readouterr().err


def test_only_a_dead_process_half_written_file_is_swept_away(workspace):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left, others = (workspace / f".x.json.{pid}.tmp" for pid in (dead.pid, os.getppid()))
    left.touch()
    others.touch()
    artifacts.write_json(workspace / "x.json", {})
    assert not left.exists()
    assert others.exists()


def test_a_foreign_folder_is_named_and_left_alone():
    stray = artifacts.folder("assistants/old") / "model.safetensors"
    stray.touch()
    others = {"baselines": {}, "exports": {}}
    check_foreign({"assistants": {"old": {}, "new": {}}, **others})
    with pytest.raises(ConfigError, match="artifacts/assistants/old belongs to no key"):
        check_foreign({"assistants": {"new": {}}, **others})
    assert stray.exists()


def test_curves_hold_the_validated_epochs_only(workspace):
    unseen = Epoch(number=2, step=10, lr=0.05, train_loss=0.4)
    artifacts.write_curves(workspace / "curves.csv", [*EPOCHS, unseen])
    assert (workspace / "curves.csv").read_text().splitlines() == [
        "epoch,step,lr,train_loss,val_accuracy",
        "1,5,0.1,0.5,0.25",
    ]


def test_the_digest_of_plain_data_ignores_the_order_of_keys():
    assert artifacts.digest({"a": 1, "b": 2}) == artifacts.digest({"b": 2, "a": 1})
