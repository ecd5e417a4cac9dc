"""Predict a training's memory before it starts, and split batches that run out of memory.

B batch.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kd.component import ConfigError, Refused
from kd.data import Images
from kd.recipe import Recipe
from kd.train.lesson import Lesson
from kd.train.ranks import position

MIB = 2**20
PROBE = 4
"""Images in the batch whose activations are measured.  Half of them are measured too: what both
keep, such as half-precision copies of the weights, does not grow with the batch."""


CGROUPS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)
"""Per cgroup version (2, then 1): the files with the memory limit, the usage and its statistics,
and the name of the statistic for inactive file pages."""


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step, by purpose."""

    weights: int
    """The learner's parameters, buffers, gradients, optimiser states and running mean, and what
    the forward pass keeps regardless of the batch size."""
    members: int
    """The teachers' parameters and buffers."""
    activations: int
    """What the forward pass keeps for the backward pass, for the whole batch; excludes what grows
    with its square, and what activation checkpointing recomputes."""
    passing: int
    """The largest temporary tensors, in addition to what is kept."""
    tables: int
    """Cached soft targets, if any."""
    saving: int = 0
    """Copies of the state while it is saved between steps; 0 on a GPU, whose lie on the host."""
    present: int = 0
    """How much of all that is allocated already."""

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        step = self.activations + self.passing
        return self.weights + self.members + self.tables + max(step, self.saving)


def predict_memory(model: nn.Module, lesson: Lesson, recipe: Recipe, ranks: int = 1) -> Memory:
    """The memory that training will need, from forward passes of a few images on a copy.

    Args:
        model: The learner, on its device.
        lesson: Its images and targets, and the networks evaluated at each step.
        recipe: Batch size, optimiser and running mean.
        ranks: Devices that share the batch.
    """
    probe = copy.deepcopy(model).train()
    with torch.random.fork_rng(devices=[]), watched(probe) as made:
        half, whole = (kept_by(probe, lesson, size) for size in (PROBE // 2, PROBE))
    each = (whole - half) / (PROBE / 2)
    asked = lesson.targets.asked if lesson.targets else ()
    largest = max([*made, largest_answer(asked, lesson)], default=0)
    share = recipe.batch_size / ranks / PROBE
    size = of_parameters(probe)
    copies = 2 + len(recipe.optimizer.remembers) + (recipe.ema is not None)
    members = sum(of_parameters(network) for network in asked)
    tables = lesson.targets.nbytes if lesson.targets else 0
    on_host = lesson.images.labels_N.device.type == "cpu"
    return Memory(
        weights=copies * size + round(whole - PROBE * each),
        members=members,
        activations=round(share * PROBE * each),
        passing=round(3 * share * largest),  # a gradient, its input and a workspace
        tables=tables,
        saving=2 * (copies - 1) * size if on_host else 0,
        present=size + members + tables,
    )


def kept_by(model: nn.Module, lesson: Lesson, size: int) -> int:
    """Bytes that the forward pass of `size` images keeps, without parameters and buffers."""
    kept: dict[int, int] = {}
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        lesson.probe(model, size)
    return sum(kept.values())


def largest_answer(asked: Sequence[nn.Module], lesson: Lesson) -> int:
    """Bytes of the largest tensor in members' forward passes; of all together if stacked."""
    images_B = lesson.images.batch(torch.arange(PROBE) % len(lesson.images))
    sizes = [0]
    for network in asked:
        with torch.inference_mode(), watched(network) as made:
            network(images_B)
        sizes.append(max(made))
    return max(sizes) * (len(asked) if lesson.recipe.targets == "stacked" else 1)


@contextmanager
def watched(network: nn.Module) -> Iterator[list[int]]:
    """Collect the bytes of each tensor that the network's modules return in the block."""
    made: list[int] = []

    def see(module: nn.Module, given: object, answer: object) -> None:
        if isinstance(answer, Tensor):
            made.append(answer.nbytes)

    handles = [module.register_forward_hook(see) for module in network.modules()]
    try:
        yield made
    finally:
        for handle in handles:
            handle.remove()


def of_parameters(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])


def check_memory(needed: Memory, images: Images, recipe: Recipe) -> None:
    """Refuse a training that does not fit into memory.

    Raises:
        ConfigError: states the memory needed and free, and which key to lower, to what.
    """
    free = free_memory(images.labels_N.device) + needed.present
    if needed.total <= free:
        return
    fixed = needed.total - needed.activations - needed.passing
    fits = int(recipe.batch_size * (free - fixed) / max(1, needed.activations + needed.passing))
    advice = f"lower recipe.batch_size to {fits // 2 * 2}" if fits >= 2 else "use a smaller model"
    raise ConfigError(
        f"training needs {needed.total / MIB:,.0f} MiB and {free / MIB:,.0f} are free (weights "
        f"{needed.weights / MIB:,.0f}, teachers {needed.members / MIB:,.0f}, activations of "
        f"{recipe.batch_size} images {(needed.activations + needed.passing) / MIB:,.0f}, targets "
        f"{needed.tables / MIB:,.0f}): {advice}"
    )


def free_memory(device: torch.device) -> int:
    """Bytes that a training may still allocate on a device."""
    if device.type == "cuda":  # the driver counts PyTorch's cached memory as used
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + idle
    lines = (
        Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    )
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    return min([*found, *cgroup_memory()], default=2**62)


def cgroup_memory(folder: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Bytes left under the container's memory limit, if there is one.

    Inactive file pages (memory-mapped data and tables) count as free: they can be evicted.
    """
    found = []
    for limit, current, stat, idle in CGROUPS:
        try:
            most = int((folder / limit).read_text())
            used = int((folder / current).read_text())
            lines = (folder / stat).read_text().splitlines()
        except (OSError, ValueError):  # no such file, or no limit: "max"
            continue
        files = next((int(line.split()[1]) for line in lines if line.startswith(f"{idle} ")), 0)
        found.append(most - used + files)
    return found


def halved(shares: int, lesson: Lesson, model: nn.Module, error: RuntimeError) -> int:
    """Twice as many parts per batch, after a step ran out of memory.

    Raises:
        Refused: the parts would not give the whole batch's gradient, or it cannot be split.
    """
    size = lesson.recipe.batch_size
    reason = ""
    if position()[1] > 1:
        reason = "other devices wait for the gradient of this part"
    elif any(isinstance(module, _BatchNorm) for module in model.modules()):
        reason = "batch normalisation sees the whole batch"
    elif lesson.recipe.compile and next(model.parameters()).is_cuda:
        reason = "CUDA graphs overwrite the gradients of the previous part"
    elif not lesson.method.by_image:
        reason = f"{type(lesson.method).__name__} compares images of a batch with one another"
    elif size % (4 * shares):
        reason = f"{size} images cannot be split into {2 * shares} parts"
    if reason:
        at_once = size // shares // position()[1]
        raise Refused(
            f"out of memory with {at_once} images at once, which cannot be split into parts "
            f"({reason}): lower recipe.batch_size"
        ) from error
    print(f"warning: out of memory; from now on {size // shares // 2} images at once", flush=True)
    return 2 * shares
