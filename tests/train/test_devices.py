"""What must hold on every device that is here: one battery, run for the CPU and for a GPU.

Needs PyTorch and pytest alone, so it also runs on a bare GPU machine:

    python -m pytest -q tests/train/test_devices.py tests/train/test_loop.py

Where there is none, test_pretended_gpu.py runs it on a pretended one.
"""

import dataclasses
import gc
import warnings
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kd.data import Augment
from kd.ensemble import Ensemble
from kd.methods import (
    AFD,
    BOC,
    DML,
    FFL,
    KD,
    Codistillation,
    Gated,
    OKDDip,
    OwnMean,
    ProKD,
    ProKT,
)
from kd.methods.trust import Correctness, Drop, Unbiased
from kd.models import PlainCNN, build_model
from kd.recipe import SGD, AdamW
from kd.train import Lesson, Plan, fit, memory
from kd.train.device import prepare
from kd.train.loop import Training
from tests.learners import CLASSES, Memory, network, pictures, recipe, taught, weights_of
from tests.methods.test_methods import METHODS

from .conftest import NO_GPU, NO_MEMORY

TEACHERS = {"ensemble": taught()["ensemble"]}
ASKS_NOTHING = {
    "labels": {},
    "adamw": {"optimizer": AdamW()},
    "clipped": {"clip_norm": 1.0},
    "mean": {"ema": 0.9},
    "mixup": {"mixup": 0.4},
    "bf16": {"precision": "bf16"},
    "cached": {"targets": "cached", **taught()},
    "online": {"targets": "online", **taught()},
    "stacked": {"targets": "stacked", **taught()},
    "correctness": {"method": KD(trust=Correctness()), "targets": "online", **TEACHERS},
    "drop": {"method": KD(trust=Drop()), "targets": "online", **TEACHERS},
    "unbiased": {"method": KD(trust=Unbiased(biased="1")), "targets": "online", **TEACHERS},
    "own mean": {"method": OwnMean()},
    "codistillation": {"method": Codistillation(every=2)},
    "dml": {"method": DML()},
    "gated": {"method": Gated(), "targets": "online", **TEACHERS},
}
LEARNED_WITH = {m.kind: m for m in (ProKT(), ProKD(), OKDDip(), FFL(), AFD(), BOC())}
EVERY_METHOD = {
    name: {"method": method, "targets": "online", **TEACHERS}
    for name, method in (METHODS | LEARNED_WITH).items()
}
WAIT_ONCE = {"kd_min_norm", "dkd_min_norm", "dist_min_norm"}
"""The CPU finds their weights, at each step."""
HARMLESS = {"drop": 2, "mixup": 1, "unbiased": 1}
"""The most that a step may ask for: numbers that the CPU drew itself, and a zero that is filled in
(PyTorch 2.15 asks for less)."""


def learner(method, ensemble):
    if method is None:
        return network()
    peers = [network(1)] if method.num_peers.start else []
    return method.learner(network(), peers, ensemble.described() if ensemble else None)


def training(device, images=None, total=100, tables=None, **settings):
    images = images or pictures(device=device)
    method, ensemble = settings.pop("method", None), settings.pop("ensemble", None)
    given = recipe(**settings)
    lesson = Lesson(images, given, 0, CLASSES, method, ensemble, tables, total)
    return Training(learner(method, ensemble).to(device), lesson, Plan(given, total))


class Asked(TorchDispatchMode):
    """Counts what makes the host wait for what a device computed."""

    WAITS = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "is_nonzero",
        "equal",
        "_unique2",
    )

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name == "lift_fresh":  # numbers of the host, which would have to be sent
            self.found[name] += 1
        chosen = args[1] if name == "index" else ()  # by a mask, whose count decides a shape
        if name in self.WAITS or any(
            each.dtype == torch.bool for each in chosen if each is not None
        ):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", ASKS_NOTHING)
def test_a_step_asks_the_device_for_nothing(case):
    """A GPU is told what to do long before it does it, unless somebody wants to know a result."""
    made = training("cpu", **ASKS_NOTHING[case])
    made.step(0)
    with Asked() as asked:
        made.step(1)
    assert asked.found.total() <= HARMLESS.get(case, 0), asked.found


def test_asking_is_noticed():
    with Asked() as asked:
        torch.ones(3).sum().item()
        torch.ones(3)[torch.tensor([True, False, True])]
    assert asked.found == {"_local_scalar_dense": 1, "index": 1, "lift_fresh": 1}


@contextmanager
def waiting_is_an_error():
    """CUDA's own check, which warns once that it is a prototype."""
    try:
        with warnings.catch_warnings(action="ignore"):
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@NO_GPU
def test_a_gpu_refuses_the_hosts_tensors_and_says_who_waits_for_it():
    """What the next tests rely on."""
    there = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError):
        there + torch.ones(3)
    with pytest.raises(TypeError):
        there.numpy()
    for ask in (Tensor.item, Tensor.cpu, Tensor.nonzero, lambda x: x[x > 0], there.copy_):
        with waiting_is_an_error(), pytest.raises(RuntimeError):
            ask(torch.ones(1) if ask == there.copy_ else there[:1])


NEVER_WAIT = ASKS_NOTHING | {k: v for k, v in EVERY_METHOD.items() if k not in WAIT_ONCE}


@NO_GPU
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("case", NEVER_WAIT)
def test_no_step_waits_for_a_gpu(case, streamed):
    images = pictures(device="cuda")
    if streamed:
        images = dataclasses.replace(images, pixels_NHWC=images.pixels_NHWC.cpu())
    made = training("cuda", images, **NEVER_WAIT[case])
    for step in range(2):
        made.step(step)
    with waiting_is_an_error():
        for step in range(2, 4):
            made.step(step)


@pytest.mark.parametrize("case", ["labels", "cached", "online", "mixup"])
def test_images_that_are_streamed_teach_what_held_ones_teach(case, device, monkeypatch):
    held = pictures(device=device)
    parts = held.pixels_NHWC.cpu().split([15, 25])
    streamed = dataclasses.replace(held, pixels_NHWC=parts[0], beyond_NHWC=parts[1:], source="")
    settings = ASKS_NOTHING[case]
    ours = [training(device, images, **settings) for images in (held, streamed)]
    monkeypatch.setattr("kd.train.targets.TABLE_BYTES", 0)
    ours.append(training(device, streamed, **settings))  # rows read from the host, too
    for each in ours:
        for step in range(12):
            each.step(step)
    assert len({weights_of(each.model) for each in ours}) == 1


@NO_GPU
@pytest.mark.parametrize("case", EVERY_METHOD)
def test_a_gpu_learns_what_a_cpu_learns_but_for_rounding(case):
    """In float32 proper: TF32 would show in the third digit.  Few steps: differences grow."""
    here, there = (training(device, **EVERY_METHOD[case]) for device in ("cuda", "cpu"))
    for step in range(3):
        here.step(step)
        there.step(step)
    assert here.watch.mean() == pytest.approx(there.watch.mean(), rel=1e-4)
    for ours, theirs in zip(here.model.parameters(), there.model.parameters(), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["labels", "cached", "mean", "bf16"])
def test_a_compiled_network_learns_the_same_but_for_rounding(case, device):
    settings = ASKS_NOTHING[case]
    plain, fast = training(device, **settings), training(device, compile=True, **settings)
    for step in range(10):
        plain.step(step)
        fast.step(step)
    rough = 0.05 if case == "bf16" else 1e-3
    assert fast.watch.mean() == pytest.approx(plain.watch.mean(), rel=rough)


@pytest.mark.slow
def test_a_compiled_training_resumes_to_the_same_bits(device):
    def train(model, checkpoint):
        settings = recipe(compile=True, checkpoint_steps=1)
        images = pictures(device=device)
        given = {"seed": 0, "num_classes": CLASSES, "checkpoint": checkpoint}
        return fit(model, images, settings, **given)[0]

    whole, halfway = train(network(dropout=0.5), Memory()), Memory(stop_after=7)
    with pytest.raises(KeyboardInterrupt):
        train(network(dropout=0.5), halfway)
    assert weights_of(train(network(9, dropout=0.5), halfway)) == weights_of(whole)


def test_what_may_be_summed_in_any_order_resumes_to_the_same_but_for_rounding(device):
    """`deterministic: false`: the tolerance that docs/training.md states."""
    prepare(recipe(device=device, deterministic=False))
    settings = recipe(checkpoint_steps=1, deterministic=False)

    def train(model, checkpoint):
        images = pictures(device=device)
        return fit(
            model, images, settings, seed=0, num_classes=CLASSES, checkpoint=checkpoint, **taught()
        )[0]

    whole, halfway = train(network(), Memory()), Memory(stop_after=7)
    with pytest.raises(KeyboardInterrupt):
        train(network(), halfway)
    resumed = train(network(9), halfway)
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)


@NO_GPU
def test_what_a_gpu_cannot_do_exactly_is_what_was_asked_for():
    try:
        prepare(recipe(device="cuda", deterministic=False, precision="tf32"))
        assert torch.backends.cudnn.benchmark
        assert torch.backends.cuda.matmul.allow_tf32
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        prepare(recipe(device="cuda"))
    assert not torch.backends.cudnn.allow_tf32


@NO_MEMORY
def test_the_predicted_peak_is_near_a_gpus():
    gc.collect()
    torch.cuda.empty_cache()
    images = dataclasses.replace(
        pictures(device="cuda"),
        pixels_NHWC=torch.zeros((512, 32, 32, 3), dtype=torch.uint8, device="cuda"),
        labels_N=torch.arange(512, device="cuda") % 10,
        mean=(0.5,) * 3,
        std=(1.0,) * 3,
        augment=Augment(),
    )
    model = build_model(PlainCNN(depth=4), channels=3, image_size=32, num_classes=10).cuda()
    settings = recipe(batch_size=512, epochs=1)
    lesson = Lesson(images, settings, 0, 10, None, None)
    predicted = memory.predict_memory(model, lesson, settings).total
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fit(model, images, settings, seed=0, num_classes=10, epoch_steps=2)
    measured = torch.cuda.max_memory_allocated() - before
    assert 0.5 < predicted / measured < 2


@NO_MEMORY
def test_a_gpu_that_runs_out_of_memory_takes_the_batch_in_parts(capsys):
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Conv2d(1, 256, 3, padding=1), nn.ReLU(), nn.Flatten())
    model = nn.Sequential(wide, nn.Linear(256 * 64, CLASSES))
    images, settings = pictures(4096, device="cuda"), recipe(batch_size=4096, epochs=1)
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    room = torch.cuda.memory_allocated() + 600 * 2**20  # a whole batch's activations take 512 MiB
    torch.cuda.set_per_process_memory_fraction(room / total)
    try:
        fit(model, images, settings, seed=0, num_classes=CLASSES)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "images at once" in capsys.readouterr().out


@NO_GPU
def test_a_gpus_table_is_a_cpus_but_for_rounding():
    who = Ensemble((network(5).eval(),), (1.0,))
    made = {}
    for device in ("cpu", "cuda"):
        shown = training(device, method=KD(), ensemble=who, targets="cached")
        made[device] = shown.lesson.targets.rows_VNR.cpu()
    torch.testing.assert_close(made["cuda"], made["cpu"], rtol=1e-2, atol=1e-2)


def test_sgd_is_the_same_fused_or_not_but_for_rounding(device):
    fused, plain = (training(device, optimizer=SGD(fused=each)) for each in (True, False))
    for step in range(10):
        fused.step(step)
        plain.step(step)
    for ours, theirs in zip(fused.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
