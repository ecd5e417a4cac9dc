"""Predicted against measured peaks, and what happens where memory does not suffice."""

import subprocess
import sys
import weakref
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

from kd.component import ConfigError, Refused
from kd.data import Augment
from kd.train import Lesson, Plan, fit, memory
from kd.train.loop import Training
from tests.learners import CLASSES, network, pictures, recipe, taught

PROJECT = Path(__file__).parents[2]
MEASURE = """
import sys
from pathlib import Path
import torch
from kd.data import Images
from kd.ensemble import Ensemble
from kd.methods import KD
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

def network(depth, width):
    model = PlainCNN(depth=depth, width=width)
    return build_model(model, channels=3, image_size=32, num_classes=10)

def train(batch_size):
    recipe = Recipe(epochs=1, batch_size=batch_size, targets="online")
    taught = {}
    model = network(4, 1.0)
    if "taught" in sys.argv:
        taught = {"method": KD(), "ensemble": Ensemble((network(8, 4.0),), (1.0,))}
        model = network(2, 0.25)
    lesson = Lesson(images, recipe, 0, 10, taught.get("method"), taught.get("ensemble"))
    needed = predict_memory(model, lesson, recipe)
    fit(model, images, recipe, seed=0, num_classes=10, epoch_steps=2, **taught)
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


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory")


class Narrow(nn.Module):
    """Runs out of memory where a batch has more images than `fits`, as a GPU would."""

    def __init__(self, inner, fits, error=OUT_OF_MEMORY):
        super().__init__()
        self.inner, self.fits, self.error, self.batches = inner, fits, error, []

    def forward(self, images):
        self.batches.append(len(images))
        if len(images) > self.fits:
            raise self.error
        return self.inner(images)


@pytest.mark.parametrize("taught", [False, True])
def test_the_predicted_peak_is_near_the_measured_one(taught):
    """By labels, or on-line by a teacher that is far larger than its student."""
    command = [sys.executable, "-c", MEASURE, *(["taught"] * taught)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    predicted, measured = map(int, done.stdout.split())
    assert measured > 100 * memory.MIB
    assert 0.6 < predicted / measured < 1.6


def test_memory_is_counted_by_what_takes_it():
    images, settings = pictures(augment=Augment()), recipe(batch_size=8, ema=0.9)
    model = plain_network()
    lesson = Lesson(images, settings, 0, CLASSES, None, None)
    found = memory.predict_memory(model, lesson, settings)
    parameters = 8 * 9 + 8 + 288 * CLASSES + CLASSES
    assert found.weights == 4 * parameters * 4  # weights, gradients, momentum, running mean
    image, activation = 64 * 4, 288 * 4  # the ReLU's result is what the linear layer keeps, too
    assert found.activations >= 8 * (image + activation)
    assert found.members == found.tables == 0
    doubled = memory.predict_memory(model, lesson, recipe(batch_size=16, ema=0.9))
    assert doubled.activations == 2 * found.activations
    assert memory.predict_memory(model, lesson, settings, ranks=2).activations == (
        found.activations // 2
    )


def test_half_precision_takes_half_of_what_grows_with_the_batch():
    """The weights' own copies in half precision are there once, whatever the batch."""
    found = {}
    for precision in ("fp32", "bf16"):
        settings = recipe(precision=precision)
        lesson = Lesson(pictures(), settings, 0, CLASSES, None, None)
        found[precision] = memory.predict_memory(plain_network(), lesson, settings)
    assert found["bf16"].activations < 0.6 * found["fp32"].activations
    assert found["bf16"].weights > found["fp32"].weights


def test_many_weights_and_few_images_take_most_while_they_are_saved():
    """A state is copied, and then once more as the file's bytes; no activations are there then."""
    settings = recipe(batch_size=2, ema=0.9)
    lesson = Lesson(pictures(), settings, 0, CLASSES, None, None)
    wide = nn.Sequential(nn.Flatten(), nn.Linear(64, 4096), nn.ReLU(), nn.Linear(4096, CLASSES))
    found = memory.predict_memory(wide, lesson, settings)
    parameters = 64 * 4096 + 4096 + 4096 * CLASSES + CLASSES
    assert found.saving == 2 * 3 * parameters * 4  # of weights, momentum and running mean
    assert found.total == found.weights + found.saving


def test_counting_changes_neither_the_model_nor_the_random_numbers():
    model, settings = network(dropout=0.5), recipe()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    lesson = Lesson(pictures(), settings, 0, CLASSES, None, None)
    memory.predict_memory(model, lesson, settings)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert torch.get_rng_state().equal(state)


def test_what_cannot_fit_is_refused_with_a_batch_size_that_would(monkeypatch):
    images, settings = pictures(), recipe(batch_size=64)
    lesson = Lesson(images, settings, 0, CLASSES, None, None)
    needed = memory.predict_memory(plain_network(), lesson, settings)
    for_half = needed.weights + (needed.activations + needed.passing) // 2 - needed.present
    monkeypatch.setattr(memory, "free_memory", lambda device: for_half + 100)
    with pytest.raises(ConfigError, match=r"lower recipe\.batch_size to 32"):
        fit(plain_network(), images, settings, seed=0, num_classes=CLASSES)
    monkeypatch.setattr(memory, "free_memory", lambda device: 100)
    with pytest.raises(ConfigError, match="a smaller model"):
        fit(plain_network(), images, settings, seed=0, num_classes=CLASSES)


def test_what_is_taken_already_is_not_asked_for_again(monkeypatch):
    images, settings, who = pictures(), recipe(targets="cached"), taught()
    lesson = Lesson(images, settings, 0, CLASSES, who["method"], who["ensemble"])
    needed = memory.predict_memory(network(), lesson, settings)
    assert needed.members == 0  # whoever is cached need not stay
    assert needed.tables > 0
    assert needed.present > needed.tables
    monkeypatch.setattr(memory, "free_memory", lambda device: needed.total - needed.present)
    memory.check_memory(needed, images, settings)


GIB = 2**30


@pytest.mark.parametrize("version", [1, 2])
def test_a_containers_limit_counts_but_files_that_were_read_do_not(tmp_path, version):
    names = ("memory.max", "memory.current", "memory.stat", "inactive_file")
    if version == 1:
        (tmp_path / "memory").mkdir()
        names = memory.CGROUPS[1]
    limit, current, stat, line = names
    (tmp_path / limit).write_text(f"{8 * GIB}\n")
    (tmp_path / current).write_text(f"{7 * GIB}\n")
    (tmp_path / stat).write_text(f"anon {GIB}\n{line} {6 * GIB}\n")
    assert memory.cgroup_memory(tmp_path) == [7 * GIB]


def test_a_container_without_a_limit_has_none(tmp_path):
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1\n")
    assert memory.cgroup_memory(tmp_path) == []


def test_free_memory_is_what_the_machine_says():
    assert 0 < memory.free_memory(torch.device("cpu")) < 2**50


@pytest.mark.parametrize(
    "error",
    [
        OUT_OF_MEMORY,
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: out of memory"),  # the driver's
    ],
    ids=["allocator", "cuBLAS", "cuDNN", "driver"],
)
def test_a_batch_that_does_not_fit_is_taken_in_parts_with_the_same_gradient(error, capsys):
    settings = recipe(batch_size=32, epochs=1)
    whole, history = fit(plain_network(), pictures(64), settings, seed=0, num_classes=CLASSES)
    narrow = Narrow(plain_network(), 8, error)
    in_parts, in_parts_history = fit(narrow, pictures(64), settings, seed=0, num_classes=CLASSES)
    assert "from now on 8 images at once" in capsys.readouterr().out
    assert narrow.batches == [32, 16] + [8] * 8
    assert in_parts_history[0].train_loss == pytest.approx(history[0].train_loss, rel=1e-5)
    for ours, theirs in zip(in_parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_another_error_is_not_taken_for_a_lack_of_memory():
    broken = Narrow(plain_network(), 8, RuntimeError("no kernel image is available"))
    with pytest.raises(RuntimeError, match="no kernel image"):
        fit(broken, pictures(64), recipe(batch_size=32), seed=0, num_classes=CLASSES)
    assert broken.batches[-1] == 32


class Saving(torch.autograd.Function):
    """Keeps an activation for the backward pass."""

    kept: ClassVar[list[weakref.ref[torch.Tensor]]] = []

    @staticmethod
    def forward(ctx, images):
        activation = images * 1.0
        ctx.save_for_backward(activation)
        Saving.kept.append(weakref.ref(activation))
        return images.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Failing(torch.autograd.Function):
    """Fails in the backward pass where a batch is too large."""

    @staticmethod
    def forward(ctx, images):
        return images.clone()

    @staticmethod
    def backward(ctx, gradient):
        if len(gradient) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return gradient


class OutOfMemoryBackwards(nn.Module):
    """Notes at each batch how many activations of batches that did not fit are still there."""

    def __init__(self):
        super().__init__()
        self.inner, self.alive = plain_network(), []

    def forward(self, images):
        if self.training:
            self.alive.append(sum(kept() is not None for kept in Saving.kept))
        return Failing.apply(self.inner[1:](Saving.apply(self.inner[0](images))))


def test_what_did_not_fit_is_let_go_before_its_parts_are_tried():
    Saving.kept.clear()
    model, settings = OutOfMemoryBackwards(), recipe(batch_size=32, epochs=1)
    lesson = Lesson(pictures(64), settings, 0, CLASSES, None, None)
    training = Training(model, lesson, Plan(settings, 1))
    training.step(0)
    assert model.alive == [0] * (1 + 1 + 4)  # 32 at once, 16, then 8 four times


@pytest.mark.parametrize(
    ("model", "size", "reason"),
    [
        (network(), 32, "batch normalisation"),
        (plain_network(), 34, "cannot be split"),
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
