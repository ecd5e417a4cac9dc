"""Precision by measurement."""

import pytest
import torch

from kd import artifacts
from kd.train import speed
from tests.learners import CLASSES, network, pictures, recipe


@pytest.mark.parametrize(
    ("fp32", "bf16", "chosen"), [(1.0, 0.5, "bf16"), (1.0, 0.9, "fp32"), (1.0, 9.0, "fp32")]
)
def test_bf16_is_taken_where_it_is_faster_by_a_fifth(fp32, bf16, chosen, monkeypatch):
    seconds = {"fp32": fp32, "bf16": bf16}
    monkeypatch.setattr(
        speed, "step_seconds", lambda model, images, recipe, classes: seconds[recipe.precision]
    )
    assert speed.faster_precision(network(), pictures(), recipe(), CLASSES) == chosen


def test_measuring_leaves_the_model_and_the_random_numbers_alone():
    model = network(dropout=0.5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    chosen = speed.faster_precision(model, pictures(), recipe(precision="auto"), CLASSES, rounds=1)
    assert chosen in ("fp32", "bf16")
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.get_rng_state().equal(state)


def test_a_machine_is_asked_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answers = iter(["bf16", "fp32"])

    def ask():
        return {"precision": next(answers)}

    for _ in range(2):
        found = artifacts.remembered("precision", {"batch_size": 8}, ask)
        assert found["precision"] == "bf16"
    assert artifacts.remembered("precision", {"batch_size": 9}, ask)["precision"] == "fp32"
