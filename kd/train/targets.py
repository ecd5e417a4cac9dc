"""A step's soft targets: looked up in precomputed tables, or computed by the members online.

Members and weights are fixed before the student learns, so targets of views that recur can be
cached.  The tables hold each member's logits for a finite set of views, so trainings with other
weights, temperatures, methods or student seeds can share them.  When training starts they are
reduced to the one row per image and view that the loss needs.

B batch, N images, V views of an image, K members, C classes, R entries of a row.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from kd.component import ConfigError, source_of
from kd.data import Images, sent
from kd.ensemble import Ensemble, digest_of_tensors
from kd.methods import Reduction
from kd.recipe import Recipe
from kd.train.device import FORMATS
from kd.train.folding import folded
from kd.train.plan import Batch
from kd.train.state import Stopped

TABLE_BYTES = 2**30
"""Largest table of rows held in memory; the rows of larger ones are reduced at each step."""

KEPT_BYTES = 2**32
"""Largest table, one per member and on disk, that `recipe.targets: auto` makes."""


class Tables(Protocol):
    """Where members' logits are kept between trainings; kd.artifacts has the one on disk."""

    def table(
        self, record: Mapping[str, object], shape: tuple[int, ...], fill: Callable[[Tensor], None]
    ) -> Tensor:
        """The float16 table for `record`; created by `fill` if there is none.

        A damaged table, or one whose record differs in anything, is never returned.
        """


class InMemory:
    """Tables that are recomputed each time."""

    def table(
        self, record: Mapping[str, object], shape: tuple[int, ...], fill: Callable[[Tensor], None]
    ) -> Tensor:
        """See `Tables`."""
        table = torch.empty(shape, dtype=torch.float16)
        fill(table)
        return table


class Targets(Protocol):
    """The rows of reduced logits for each step."""

    views: int | None
    """Passes after which an image's views recur; None: each pass draws new ones."""

    nbytes: int
    """Memory on the device that is held from step to step."""

    on_host: bool
    """Whether rows are looked up in tables on the CPU."""

    asked: tuple[nn.Module, ...]
    """The networks that are evaluated at each step."""

    def rows(self, images_B: Tensor, shown: Batch) -> Tensor:
        """Rows (B, R) for the images in their views, without an autograd graph."""


def targets_of(
    ensemble: Ensemble,
    reduction: Reduction,
    images: Images,
    recipe: Recipe,
    num_classes: int,
    tables: Tables | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Targets:
    """The targets of all steps, computed as `recipe.targets` says; `auto` picks the cheaper way.

    Raises:
        ConfigError: `recipe.targets` does not suit the members.
        Stopped: `stop` returned true while a table was computed.
    """
    cached = recipe.targets == "cached" or (
        recipe.targets == "auto" and cache_pays(images, recipe, num_classes)
    )
    if not cached:
        return Online(ensemble, reduction, images, recipe)
    return Cached(ensemble, reduction, images, recipe, num_classes, tables or InMemory(), stop)


def cache_pays(images: Images, recipe: Recipe, num_classes: int) -> bool:
    """Whether computing each view once is cheaper than evaluating the members at each step."""
    num_views = min(images.augment.num_views, recipe.views or images.augment.num_views)
    fits = 2 * num_views * len(images) * num_classes <= KEPT_BYTES
    return recipe.mixup == 0 and num_views < recipe.epochs and fits


class Online:
    """Rows computed at each step from the images that the student sees."""

    views: int | None = None
    nbytes = 0
    on_host = False

    def __init__(
        self, ensemble: Ensemble, reduction: Reduction, images: Images, recipe: Recipe
    ) -> None:
        self.reduction = reduction
        self.labels_N = images.labels_N
        self.recipe = recipe
        self.asked = tuple(as_asked(member, images, recipe) for member in ensemble.members)
        asked = replace(ensemble, members=self.asked)
        self.logits = stacked(asked) if recipe.targets == "stacked" else asked.logits

    def rows(self, images_B: Tensor, shown: Batch) -> Tensor:
        """See `Targets`."""
        with torch.inference_mode(), autocast(images_B.device, self.recipe):
            logits_KBC = self.logits(images_B)
        with torch.inference_mode():
            labels_B = self.labels_N[sent(shown.indices_B, images_B.device)]
            rows_BR = self.reduction(logits_KBC, labels_B)
        return rows_BR.clone()  # autograd refuses inference tensors; a clone is a normal one


def as_asked(member: nn.Module, images: Images, recipe: Recipe) -> nn.Module:
    """The network evaluated for a member: its folded copy, on the device of the images.

    Members to be stacked are not folded: folded copies differ in class.  And they are contiguous:
    under vmap, a GPU's batch norms refuse channels_last.
    """
    device, memory_format = images.labels_N.device, FORMATS[recipe.memory_format]
    if recipe.targets == "stacked":
        memory_format = torch.contiguous_format
    else:
        few_B = images.batch(torch.arange(2) % len(images)).to(next(member.parameters()).device)
        member = folded(member, few_B)
    return member.to(device).to(memory_format=memory_format)


def stacked(ensemble: Ensemble) -> Callable[[Tensor], Tensor]:
    """Like `ensemble.logits`, but with one batched call for all members.

    Raises:
        ConfigError: the members' architectures differ.
    """
    members = list(ensemble.members)
    if len({str(member) for member in members}) > 1:
        raise ConfigError("recipe.targets is stacked, but the teachers differ: set it to online")
    parameters, buffers = stack_module_state(members)
    form = copy.deepcopy(members[0]).to("meta")  # its tensors are never used

    def of_member(
        parameters: dict[str, Tensor], buffers: dict[str, Tensor], images_B: Tensor
    ) -> Tensor:
        logits_BC: Tensor = functional_call(form, (parameters, buffers), (images_B,))
        return logits_BC.float()

    of_all = vmap(of_member, in_dims=(0, 0, None))
    # Cloned, since of one channel `contiguous` would leave the strides of channels_last.
    plain = torch.contiguous_format
    return lambda images_B: of_all(parameters, buffers, images_B.clone(memory_format=plain))


class Cached:
    """Rows looked up by image and view.

    A view's number determines its shift and flip, so each row was computed from exactly the
    pixels that the student sees.
    """

    asked: tuple[nn.Module, ...] = ()

    def __init__(
        self,
        ensemble: Ensemble,
        reduction: Reduction,
        images: Images,
        recipe: Recipe,
        num_classes: int,
        tables: Tables,
        stop: Callable[[], bool],
    ) -> None:
        num_views = images.augment.num_views
        recurs = recipe.views is not None and recipe.views < num_views
        self.views: int | None = recipe.views if recurs else None
        self.reduction = reduction
        self.labels_N = images.labels_N
        shape = (self.views or num_views, len(images), num_classes)
        self.members = [
            tables.table(
                table_record(member, images, recipe, self.views),
                shape,
                partial(
                    fill,
                    member=member,
                    images=images,
                    recipe=recipe,
                    views=self.views,
                    stop=stop,
                ),
            )
            for member in ensemble.members
        ]
        self.rows_VNR = self.reduced()
        self.nbytes = 0 if self.rows_VNR is None else self.rows_VNR.nbytes
        self.on_host = self.rows_VNR is None

    def reduced(self) -> Tensor | None:
        """All rows, on the device; None if they exceed TABLE_BYTES."""
        num_views, num_images, _ = self.members[0].shape
        everyone = torch.arange(num_images)
        width = self.of(torch.zeros_like(everyone[:1]), everyone[:1]).shape[1]
        if 4 * num_views * num_images * width > TABLE_BYTES:
            return None
        device = self.labels_N.device
        rows_VNR = torch.empty((num_views, num_images, width), device=device)
        for slot in range(num_views):
            for part in everyone.split(2**14):
                rows_VNR[slot, part.to(device)] = self.of(torch.full_like(part, slot), part)
        return rows_VNR

    def of(self, slots_B: Tensor, indices_B: Tensor) -> Tensor:
        """Rows, on the device, reduced from the members' logits; slots and indices on the CPU."""
        device = self.labels_N.device
        found = [sent(table[slots_B, indices_B], device).float() for table in self.members]
        return self.reduction(torch.stack(found), self.labels_N[sent(indices_B, device)])

    def rows(self, images_B: Tensor, shown: Batch) -> Tensor:
        """See `Targets`."""
        slots_B = shown.views_B if self.views is None else shown.passes_B
        if self.rows_VNR is None:
            return self.of(slots_B, shown.indices_B)
        device = self.rows_VNR.device
        return self.rows_VNR[sent(slots_B, device), sent(shown.indices_B, device)]


def table_record(
    member: nn.Module, images: Images, recipe: Recipe, views: int | None
) -> dict[str, object]:
    """Everything that determines a member's table; trainings with equal records share it."""
    return {
        "images": images.identity,
        "augment": asdict(images.augment),
        "mean": list(images.mean),
        "std": list(images.std),
        "views": views,
        "member": digest_of_tensors(member.state_dict()),
        "architecture": str(member),
        "source": sorted({source_of(kind) for kind in {type(each) for each in member.modules()}}),
        "precision": recipe.precision,
        "memory_format": recipe.memory_format,
        "device": images.labels_N.device.type,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


def fill(
    table_VNC: Tensor,
    member: nn.Module,
    images: Images,
    recipe: Recipe,
    views: int | None,
    stop: Callable[[], bool],
) -> None:
    """Write the member's logits for every view of every image.

    Raises:
        ConfigError: a logit is not finite in half precision.
        Stopped: `stop` returned true; the incomplete table is discarded.
    """
    asked = as_asked(member, images, recipe)
    augment, everyone = images.augment, torch.arange(len(images), device=images.home)
    for slot, row_NC in enumerate(table_VNC):
        if views is None:
            views_N = torch.full_like(everyone, slot)
        else:
            views_N = augment.views_for(0, slot, len(images)).to(everyone.device)
        for part in everyone.split(images.at_once):
            if stop():
                raise Stopped("stopped while computing a teacher's table; run again to redo it")
            shown = images.batch(part, views_N[part], FORMATS[recipe.memory_format])
            with torch.inference_mode(), autocast(shown.device, recipe):
                logits_BC = asked(shown)
            row_NC[part.cpu()] = logits_BC.to(row_NC.device, torch.float16)
        if not row_NC.isfinite().all():
            raise ConfigError(
                "a teacher's logits do not fit half precision (beyond 65,504, or NaN): "
                "set recipe.targets to online"
            )


def autocast(device: torch.device, recipe: Recipe) -> torch.autocast:
    """The precision for forward passes, of learners and members alike."""
    return torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16")
