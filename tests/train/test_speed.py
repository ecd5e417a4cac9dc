"""What `auto` chooses, and that asking leaves no trace."""

import pytest
import torch

from kd.component import ConfigError, Refused
from kd.machine import remembered
from kd.train import fit, speed
from kd.train.loop import Training
from tests.learners import CLASSES, network, pictures, recipe


def asked(taken, monkeypatch, steps=100, **auto):
    """What is chosen where steps take so long: (the first, each other), by the recipe's values."""

    def seconds(training, step):
        first, other = taken(training.recipe)
        return other if step else first

    monkeypatch.setattr(speed, "step_seconds", seconds)
    given = recipe(**{"precision": "fp32", "memory_format": "channels_last", **auto})
    return speed.fastest(network(), pictures(), given, num_classes=CLASSES, num_steps=steps)


@pytest.mark.parametrize(("bf16", "chosen"), [(0.5, "bf16"), (0.9, "fp32"), (9.0, "fp32")])
def test_bf16_is_taken_where_it_is_faster_by_a_fifth(bf16, chosen, monkeypatch):
    def taken(recipe):
        return (1.0, bf16 if recipe.precision == "bf16" else 1.0)

    assert asked(taken, monkeypatch, precision="auto") == {"precision": chosen}


@pytest.mark.parametrize(("rows", "chosen"), [(0.9, "contiguous"), (1.0, "channels_last")])
def test_the_memory_format_is_the_faster_one(rows, chosen, monkeypatch):
    def taken(recipe):
        return (1.0, rows if recipe.memory_format == "contiguous" else 1.0)

    assert asked(taken, monkeypatch, memory_format="auto") == {"memory_format": chosen}


@pytest.mark.parametrize(("steps", "chosen"), [(10, False), (1000, True)])
def test_compiling_must_be_gained_back_by_the_end(steps, chosen, monkeypatch):
    """Half the time a step, after a minute: 120 steps of a second make up for it."""
    monkeypatch.setattr("kd.train.loop.compiled", lambda model: model)

    def taken(recipe):
        return (60.0, 0.5) if recipe.compile else (1.0, 1.0)

    assert asked(taken, monkeypatch, steps, compile="auto") == {"compile": chosen}


def test_what_is_decided_first_counts_for_what_comes_after(monkeypatch):
    """Contiguous is the faster one in fp32 alone, and bf16 is chosen."""

    def taken(recipe):
        half = recipe.precision == "bf16"
        last = recipe.memory_format == "channels_last"
        return (1.0, (0.1 if last else 0.2) if half else (2.0 if last else 1.0))

    found = asked(taken, monkeypatch, precision="auto", memory_format="auto")
    assert found == {"precision": "bf16", "memory_format": "channels_last"}


def test_what_does_not_fit_into_memory_is_not_chosen(monkeypatch):
    plain = Training.step

    def step(training, number):
        if training.recipe.precision == "fp32":
            raise Refused("out of memory")
        plain(training, number)

    monkeypatch.setattr(Training, "step", step)
    given = {"num_classes": CLASSES, "num_steps": 10, "rounds": 1}
    found = speed.fastest(network(), pictures(), recipe(precision="auto"), **given)
    assert found == {"precision": "bf16"}


def test_what_the_recipe_says_is_not_asked(monkeypatch):
    def never(recipe):
        raise AssertionError("nothing was to be timed")

    assert asked(never, monkeypatch) == {}


def test_measuring_leaves_the_model_and_the_random_numbers_alone():
    model = network(dropout=0.5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    given = recipe(precision="auto", memory_format="auto")
    found = speed.fastest(model, pictures(), given, num_classes=CLASSES, num_steps=10, rounds=1)
    assert found["precision"] in ("fp32", "bf16")
    assert found["memory_format"] in ("channels_last", "contiguous")
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.get_rng_state().equal(state)


@pytest.fixture
def no_compiler():
    import torch._inductor.config as settings

    missing = {"cpp.cxx": (None, "/nowhere/g++"), "fx_graph_cache": False}
    with settings.patch(missing):
        torch.compiler.reset()
        yield
    torch.compiler.reset()


def test_a_machine_without_a_compiler_compiles_nothing(no_compiler):
    given = {"num_classes": CLASSES, "num_steps": 10, "rounds": 1}
    found = speed.fastest(network(), pictures(), recipe(compile="auto"), **given)
    assert found == {"compile": False}
    with pytest.raises(ConfigError, match=r"recipe\.compile is true, but .*No working C\+\+"):
        fit(network(), pictures(), recipe(compile=True), seed=0, num_classes=CLASSES)


def test_a_machine_is_asked_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answers = iter(["bf16", "fp32"])

    def ask():
        return {"precision": next(answers)}

    for _ in range(2):
        found = remembered("speed", {"batch_size": 8}, ask)
        assert found["precision"] == "bf16"
    assert remembered("speed", {"batch_size": 9}, ask)["precision"] == "fp32"
