"""How much memory a training needs: told before it starts, and what to do where it was too much.

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
"""Images in the batch that activations are counted for.  It is counted for half of them, too: what
both keep alike, such as the weights' copies in half precision, does not grow with the batch."""


CGROUPS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)
"""Files of a container's limit, of what it uses and of what that is, and the line for files that
nobody reads just now: of version 2, and of version 1."""


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step, by what takes them."""

    weights: int
    """The learner's parameters, buffers, gradients, optimiser states and running mean, and what
    the forward pass keeps whatever the batch."""
    members: int
    """The teachers' parameters and buffers."""
    activations: int
    """What the forward pass keeps for the backward pass, of the whole batch; without what grows
    with its square, and without what activation checkpointing makes anew."""
    passing: int
    """The largest tensors of the moment, beside what is kept."""
    tables: int
    """Soft targets, where they are cached."""
    saving: int = 0
    """Copies of the state while it is saved, between steps; a GPU's lie on the host."""
    present: int = 0
    """What of all that is taken already."""

    @property
    def total(self) -> int:
        """All of it."""
        step = self.activations + self.passing
        return self.weights + self.members + self.tables + max(step, self.saving)


def predict_memory(model: nn.Module, lesson: Lesson, recipe: Recipe, ranks: int = 1) -> Memory:
    """What training will need, from forward passes of a few images on a copy of the model.

    Args:
        model: Who learns; on its device.
        lesson: What it is shown, and who is asked at each step.
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
        passing=round(3 * share * largest),  # a gradient, what it is made from, a workspace
        tables=tables,
        saving=2 * (copies - 1) * size if on_host else 0,
        present=size + members + tables,
    )


def kept_by(model: nn.Module, lesson: Lesson, size: int) -> int:
    """Bytes that the forward pass of `size` images keeps, beside parameters and buffers."""
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
    """Bytes of the largest tensor that members make of a few images; all at once, of all of it."""
    images_B = lesson.images.batch(torch.arange(PROBE) % len(lesson.images))
    sizes = [0]
    for network in asked:
        with torch.inference_mode(), watched(network) as made:
            network(images_B)
        sizes.append(max(made))
    return max(sizes) * (len(asked) if lesson.recipe.targets == "stacked" else 1)


@contextmanager
def watched(network: nn.Module) -> Iterator[list[int]]:
    """Bytes of each tensor that the network's modules make while the block runs."""
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
    """Refuse to start what cannot fit.

    Raises:
        ConfigError: says what is needed and there, and which key to lower, to what.
    """
    free = free_memory(images.labels_N.device) + needed.present
    if needed.total <= free:
        return
    fixed = needed.total - needed.activations - needed.passing
    fits = int(recipe.batch_size * (free - fixed) / max(1, needed.activations + needed.passing))
    advice = f"lower recipe.batch_size to {fits // 2 * 2}" if fits >= 2 else "take a smaller model"
    raise ConfigError(
        f"training needs {needed.total / MIB:,.0f} MiB and {free / MIB:,.0f} are free (weights "
        f"{needed.weights / MIB:,.0f}, teachers {needed.members / MIB:,.0f}, activations of "
        f"{recipe.batch_size} images {(needed.activations + needed.passing) / MIB:,.0f}, targets "
        f"{needed.tables / MIB:,.0f}): {advice}"
    )


def free_memory(device: torch.device) -> int:
    """Bytes that a training may still take on a device."""
    if device.type == "cuda":  # what PyTorch holds in reserve, the driver takes for used
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + idle
    lines = (
        Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    )
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    return min([*found, *cgroup_memory()], default=2**62)


def cgroup_memory(folder: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """What a container's limit leaves, where there is one.

    Files that were read count as used until others need the room: mapped data and tables do.
    """
    found = []
    for limit, current, stat, idle in CGROUPS:
        try:
            most = int((folder / limit).read_text())
            used = int((folder / current).read_text())
            lines = (folder / stat).read_text().splitlines()
        except (OSError, ValueError):  # not there, or "max"
            continue
        files = next((int(line.split()[1]) for line in lines if line.startswith(f"{idle} ")), 0)
        found.append(most - used + files)
    return found


def halved(shares: int, lesson: Lesson, model: nn.Module, error: RuntimeError) -> int:
    """Twice as many shares of a batch, after one did not fit into memory.

    Raises:
        Refused: parts of a batch would not give the whole batch's gradient, or it cannot be cut.
    """
    size = lesson.recipe.batch_size
    reason = ""
    if position()[1] > 1:
        reason = "other devices wait for the gradient of this part"
    elif any(isinstance(module, _BatchNorm) for module in model.modules()):
        reason = "batch normalisation sees the whole batch"
    elif lesson.recipe.compile and next(model.parameters()).is_cuda:
        reason = "CUDA graphs write gradients where the last part's lie"
    elif not lesson.method.by_image:
        reason = f"{type(lesson.method).__name__} compares images of a batch with one another"
    elif size % (4 * shares):
        reason = f"{size} images cannot be cut into {2 * shares} parts"
    if reason:
        at_once = size // shares // position()[1]
        raise Refused(
            f"out of memory with {at_once} images at once, which cannot be taken in parts "
            f"({reason}): lower recipe.batch_size"
        ) from error
    print(f"warning: out of memory; from now on {size // shares // 2} images at once", flush=True)
    return 2 * shares
