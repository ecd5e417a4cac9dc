"""How much memory a training needs: told before it starts, and what to do where it was too much.

B batch.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kd.component import ConfigError, Refused
from kd.data import Images
from kd.ensemble import Ensemble
from kd.recipe import Recipe
from kd.train.lesson import Lesson
from kd.train.ranks import position

MIB = 2**20
PROBE = 4
"""Images in the batch that activations are counted for; even, and enough for batch statistics."""


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step, by what takes them."""

    weights: int
    """The learner's parameters, buffers, gradients, optimiser states and running mean."""
    members: int
    """The teachers' parameters and buffers."""
    activations: int
    """What the forward pass keeps for the backward pass, of the whole batch."""
    passing: int
    """The largest tensors of the moment, beside what is kept."""
    tables: int
    """Soft targets, where they are cached."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.members + self.activations + self.passing + self.tables


def predict_memory(
    model: nn.Module, lesson: Lesson, recipe: Recipe, ensemble: Ensemble | None, ranks: int = 1
) -> Memory:
    """What training will need, from one forward pass of a few images on a copy of the model.

    Args:
        model: Who learns.
        lesson: What it is shown.
        recipe: Batch size, optimiser and running mean.
        ensemble: Who teaches, or None.
        ranks: Devices that share the batch.
    """
    probe = copy.deepcopy(model)
    kept: dict[int, int] = {}
    largest = 0
    own = {p.untyped_storage().data_ptr() for p in [*probe.parameters(), *probe.buffers()]}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def see(module: nn.Module, given: object, made: object) -> None:
        nonlocal largest
        if isinstance(made, Tensor):
            largest = max(largest, made.nbytes)

    for module in probe.modules():
        module.register_forward_hook(see)
    probe.train()
    with (
        torch.random.fork_rng(devices=[]),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        loss = lesson.probe(probe, PROBE)
    del loss
    share = recipe.batch_size / ranks / PROBE
    size = of_parameters(probe)
    copies = 2 + len(recipe.optimizer.remembers) + (recipe.ema is not None)
    return Memory(
        weights=copies * size,
        members=sum(of_parameters(member) for member in ensemble.members) if ensemble else 0,
        activations=round(share * sum(kept.values())),
        passing=round(3 * share * largest),  # a gradient, what it is made from, a workspace
        tables=lesson.targets.nbytes if lesson.targets else 0,
    )


def of_parameters(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])


def check_memory(needed: Memory, images: Images, recipe: Recipe) -> None:
    """Refuse to start what cannot fit.

    Raises:
        ConfigError: says what is needed and there, and which key to lower, to what.
    """
    free = free_memory(images.labels_N.device)
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
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = (
        Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    )
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    return min([*found, *cgroup_memory()], default=2**62)


def cgroup_memory() -> list[int]:
    """What a container's limit leaves, where there is one."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
    except (OSError, ValueError):
        return []
    return [] if limit == "max" else [int(limit) - used]


def halved(shares: int, lesson: Lesson, model: nn.Module, error: torch.OutOfMemoryError) -> int:
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
    elif not lesson.method.by_image:
        reason = f"{type(lesson.method).__name__} compares images of a batch with one another"
    elif size % (4 * shares):
        reason = f"{size} images cannot be cut into {2 * shares} parts"
    if reason:
        raise Refused(
            f"out of memory with {size // shares // position()[1]} images at once, which cannot be "
            f"taken in parts ({reason}): lower recipe.batch_size"
        ) from error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    print(f"warning: out of memory; from now on {size // shares // 2} images at once", flush=True)
    return 2 * shares
