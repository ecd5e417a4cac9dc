"""Predicted against measured peaks, and what happens where memory does not suffice."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from kd.component import ConfigError, Refused
from kd.data import Augment
from kd.train import Lesson, fit, memory
from tests.learners import CLASSES, network, pictures, recipe

PROJECT = Path(__file__).parents[2]
MEASURE = """
from pathlib import Path
import torch
from kd.data import Images
from kd.models import PlainCNN, build_model
from kd.recipe import Recipe
from kd.train import Lesson, fit
from kd.train.memory import predict_memory

torch.set_num_threads(1)
pixels = torch.randint(255, (512, 32, 32, 3), dtype=torch.uint8)
labels = torch.arange(512) % 10
images = Images(pixels_NHWC=pixels, labels_N=labels, mean=(0.5,) * 3, std=(1.0,) * 3)

def status(entry):  # ru_maxrss would begin with the peak of the process that started this one
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(entry))

def train(batch_size):
    model = build_model(PlainCNN(depth=4), channels=3, image_size=32, num_classes=10)
    recipe = Recipe(epochs=1, batch_size=batch_size)
    needed = predict_memory(model, Lesson(images, recipe, 0, 10, None, None), recipe, None)
    fit(model, images, recipe, seed=0, num_classes=10, epoch_steps=2)
    return needed.total

train(4)  # what PyTorch itself takes
before = status("VmRSS")
needed = train(512)
print(needed, status("VmHWM") - before)
"""


def plain_network():
    """No batch normalisation: parts of a batch give the whole batch's gradient."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, CLASSES))


class Narrow(nn.Module):
    """Runs out of memory where a batch has more images than `fits`, as a GPU would."""

    def __init__(self, inner, fits):
        super().__init__()
        self.inner, self.fits, self.batches = inner, fits, []

    def forward(self, images):
        self.batches.append(len(images))
        if len(images) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.inner(images)


def test_the_predicted_peak_is_near_the_measured_one():
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    predicted, measured = map(int, done.stdout.split())
    assert measured > 100 * memory.MIB
    assert 0.6 < predicted / measured < 1.6


def test_memory_is_counted_by_what_takes_it():
    images, settings = pictures(augment=Augment()), recipe(batch_size=8, ema=0.9)
    model = plain_network()
    lesson = Lesson(images, settings, 0, CLASSES, None, None)
    found = memory.predict_memory(model, lesson, settings, None)
    parameters = 8 * 9 + 8 + 288 * CLASSES + CLASSES
    assert found.weights == 4 * parameters * 4  # weights, gradients, momentum, running mean
    image, activation = 64 * 4, 288 * 4  # the ReLU's result is what the linear layer keeps, too
    assert found.activations >= 8 * (image + activation)
    assert found.members == found.tables == 0
    doubled = memory.predict_memory(model, lesson, recipe(batch_size=16, ema=0.9), None)
    assert doubled.activations == 2 * found.activations
    assert memory.predict_memory(model, lesson, settings, None, ranks=2).activations == (
        found.activations // 2
    )


def test_counting_changes_neither_the_model_nor_the_random_numbers():
    model, settings = network(dropout=0.5), recipe()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    lesson = Lesson(pictures(), settings, 0, CLASSES, None, None)
    memory.predict_memory(model, lesson, settings, None)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert torch.get_rng_state().equal(state)


def test_what_cannot_fit_is_refused_with_a_batch_size_that_would(monkeypatch):
    images, settings = pictures(), recipe(batch_size=64)
    lesson = Lesson(images, settings, 0, CLASSES, None, None)
    needed = memory.predict_memory(plain_network(), lesson, settings, None)
    for_half = needed.weights + (needed.activations + needed.passing) // 2
    monkeypatch.setattr(memory, "free_memory", lambda device: for_half + 100)
    with pytest.raises(ConfigError, match=r"lower recipe\.batch_size to 32"):
        fit(plain_network(), images, settings, seed=0, num_classes=CLASSES)
    monkeypatch.setattr(memory, "free_memory", lambda device: 100)
    with pytest.raises(ConfigError, match="a smaller model"):
        fit(plain_network(), images, settings, seed=0, num_classes=CLASSES)


def test_free_memory_is_what_the_machine_says():
    assert 0 < memory.free_memory(torch.device("cpu")) < 2**50


def test_a_batch_that_does_not_fit_is_taken_in_parts_with_the_same_gradient(capsys):
    settings = recipe(batch_size=32, epochs=1)
    whole, history = fit(plain_network(), pictures(64), settings, seed=0, num_classes=CLASSES)
    narrow = Narrow(plain_network(), fits=8)
    in_parts, in_parts_history = fit(narrow, pictures(64), settings, seed=0, num_classes=CLASSES)
    assert "from now on 8 images at once" in capsys.readouterr().out
    assert narrow.batches == [32, 16] + [8] * 8
    assert in_parts_history[0].train_loss == pytest.approx(history[0].train_loss, rel=1e-5)
    for ours, theirs in zip(in_parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "size", "reason"),
    [
        (network(), 32, "batch normalisation"),
        (plain_network(), 34, "cannot be cut"),
    ],
)
def test_parts_that_would_change_the_result_are_refused(model, size, reason):
    with pytest.raises(Refused, match=rf"{reason}.*lower recipe\.batch_size"):
        fit(
            Narrow(model, fits=8),
            pictures(64),
            recipe(batch_size=size),
            seed=0,
            num_classes=CLASSES,
        )
