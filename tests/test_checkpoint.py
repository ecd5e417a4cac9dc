import errno

import pytest
import torch

from kd import checkpoint as module
from kd.checkpoint import DiskCheckpoint
from kd.machine import machine
from kd.train import Epoch

EPOCHS = [Epoch(number=1, step=5, lr=0.1, train_loss=0.5, validation={"accuracy": 0.25})]


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_checkpoint_comes_back_with_its_history():
    checkpoint = DiskCheckpoint("teacher", {"seed": 1})
    assert checkpoint.load() is None
    checkpoint.save({"model/w": torch.ones(3)}, EPOCHS)
    state, history = DiskCheckpoint("teacher", {"seed": 1}).load()
    assert torch.equal(state["model/w"], torch.ones(3))
    assert history == EPOCHS


def test_a_checkpoint_of_other_inputs_is_not_taken():
    DiskCheckpoint("student", {"teachers": ["a"]}).save({"w": torch.ones(1)}, EPOCHS)
    assert DiskCheckpoint("student", {"teachers": ["b"]}).load() is None


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_checkpoint_is_no_checkpoint(damage):
    checkpoint = DiskCheckpoint("teacher", {})
    checkpoint.save({"w": torch.ones(64)}, EPOCHS)
    data = bytearray(checkpoint.path.read_bytes())
    if damage == "truncated":
        data = data[:-10]
    else:
        data[-1] ^= 1
    checkpoint.path.write_bytes(bytes(data))
    assert DiskCheckpoint("teacher", {}).load() is None


def test_another_trainings_checkpoint_under_this_ones_name_is_dropped(capsys):
    mine, other = DiskCheckpoint("teacher", {"seed": 1}), DiskCheckpoint("teacher", {"seed": 2})
    other.save({"w": torch.ones(8)}, EPOCHS)
    other.path.rename(mine.path)
    assert mine.load() is None
    assert "another training's" in capsys.readouterr().out


def test_a_damaged_checkpoint_never_takes_the_place_of_the_good_one_before(monkeypatch):
    checkpoint = DiskCheckpoint("teacher", {})
    for value in (1.0, 2.0):
        checkpoint.save({"w": torch.full((8,), value)}, EPOCHS)
    data = checkpoint.path.read_bytes()
    checkpoint.path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    resumed = DiskCheckpoint("teacher", {})
    assert resumed.load()[0]["w"][0] == 1.0

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_tensors", full)
        with pytest.raises(OSError, match="No space"):
            resumed.save({"w": torch.full((8,), 3.0)}, EPOCHS)
    assert DiskCheckpoint("teacher", {}).load()[0]["w"][0] == 1.0


def test_a_checkpoints_history_is_under_its_checksum_too():
    checkpoint = DiskCheckpoint("teacher", {})
    checkpoint.save({"w": torch.ones(64)}, EPOCHS)
    whole = checkpoint.path.read_bytes()
    assert whole.count(b"0.25") == 1  # an epoch's accuracy
    checkpoint.path.write_bytes(whole.replace(b"0.25", b"0.95"))
    assert DiskCheckpoint("teacher", {}).load() is None


def test_another_machines_checkpoint_is_gone_on_from_and_said_to_be_one(monkeypatch, capsys):
    DiskCheckpoint("teacher", {}).save({"w": torch.ones(64)}, EPOCHS)
    assert DiskCheckpoint("teacher", {}).load() is not None
    assert "warning" not in capsys.readouterr().out
    here = machine()
    monkeypatch.setattr(module, "machine", lambda: {**here, "cpu_capability": "VAX"})
    assert DiskCheckpoint("teacher", {}).load() is not None
    said = capsys.readouterr().out
    assert f"another machine (cpu_capability {here['cpu_capability']}, here VAX)" in said
