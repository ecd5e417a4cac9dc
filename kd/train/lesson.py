"""What a network sees at each step, and the loss.

B batch, C classes, L labelled images.
"""

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from kd.component import ConfigError, described, require
from kd.data import Images, key, sent
from kd.ensemble import Ensemble
from kd.methods import Labels, Learning, Members, Shown, label_probs
from kd.methods.trust import Unbiased
from kd.recipe import Recipe
from kd.train.device import FORMATS
from kd.train.plan import Batch, batch_of
from kd.train.ranks import position
from kd.train.targets import Tables, Targets, autocast, targets_of


class Lesson:
    """Assembles the batch and the soft targets of each step, and computes the loss."""

    def __init__(
        self,
        images: Images,
        recipe: Recipe,
        seed: int,
        num_classes: int,
        method: Learning | None,
        ensemble: Ensemble | None,
        tables: Tables | None = None,
        num_steps: int = 1,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.images = images
        self.recipe = recipe
        self.seed = seed
        self.num_classes = num_classes
        self.num_steps = num_steps
        self.method = (method or Labels()).resolved()
        self.targets: Targets | None = None
        self.members = None
        self.labelled = float((images.labels_N >= 0).float().mean()) or 1.0
        wanted = "given with an ensemble: it says how the network learns from it"
        require(method is not None or ensemble is None, "method", method, wanted)
        if ensemble is None and self.method.needs == "teachers":
            self.method = Labels()
        check_classes(images, num_classes, taught=ensemble is not None)
        check_shares(self.method)  # before the slow part: computing the targets
        check_labels(self.method, recipe)
        if ensemble is not None:
            self.members = ensemble.described()
            check_teachers(self.method, self.members)
            check_answers(ensemble, images, num_classes)
            if reduction := self.method.reduction(self.members):
                given = (images, recipe, num_classes, tables, stop)
                self.targets = targets_of(ensemble, reduction, *given)
        at_L = (images.labels_N >= 0).nonzero()[:, 0].to(self.home)
        self.labelled_L = at_L if 0 < len(at_L) < len(images) else None

    @property
    def home(self) -> torch.device:
        """The device for a batch's indices: the CPU if images or targets are looked up there,
        since copying the indices back from a GPU would make the host wait for it.
        """
        on_host = self.targets is not None and self.targets.on_host
        return torch.device("cpu") if on_host else self.images.home

    def loss(self, model: nn.Module, step: int, share: int = 0, shares: int = 1) -> Tensor:
        """The loss of step `step`, a scalar; teachers and model see the same views.

        Args:
            model: The network that learns; returns logits, or (logits, `Shown.also`).
            step: Number of the step, from 0.
            share: Which part of the batch to use.
            shares: Number of equal parts; the mean of their losses is the loss of the batch.
        """
        alone = self.labels_alone(step)
        labelled_L = self.labelled_L if alone else None
        shown = batch_of(
            step,
            self.recipe.batch_size,
            len(self.images) if labelled_L is None else len(labelled_L),
            self.images.augment,
            self.seed,
            self.targets.views if self.targets and not alone else None,
            str(self.home),
        )
        if labelled_L is not None:
            shown = replace(shown, indices_B=labelled_L[shown.indices_B])
        if shares > 1:
            shown = shown.share(share, shares)
        return self.loss_of(model, shown, step)

    def labels_alone(self, step: int) -> bool:
        """Whether only labels are used at this step."""
        return self.method.labels_alone(step / self.num_steps)

    def probe(self, model: nn.Module, size: int) -> Tensor:
        """The loss of the first `size` images, to measure how much memory it takes."""
        given = (len(self.images), self.images.augment, self.seed, 1, str(self.home))
        first = batch_of(0, size, *given)
        return self.loss_of(model, first, 0)

    def leaves_unused(self, model: nn.Module, size: int) -> bool:
        """Whether the loss of the first `size` images gives some parameter no gradient."""
        probe = copy.deepcopy(model).train()
        learning = [each for each in probe.parameters() if each.requires_grad]
        found = torch.autograd.grad(self.probe(probe, size), learning, allow_unused=True)
        return any(gradient is None for gradient in found)

    def loss_of(self, model: nn.Module, shown: Batch, step: int) -> Tensor:
        """The loss of a batch."""
        recipe, device = self.recipe, self.images.labels_N.device
        memory_format = FORMATS[recipe.memory_format]
        images_B = self.images.batch(shown.indices_B, shown.views_B, memory_format)
        labels_B = self.images.labels_N[sent(shown.indices_B, device)]
        labels_BC = label_probs(labels_B, self.num_classes, recipe.label_smoothing)
        if recipe.mixup:
            images_B, labels_BC = mixed(images_B, labels_BC, recipe.mixup, self.seed, step)
        with autocast(device, recipe):
            said = model(images_B)
        logits_BC, also = said if isinstance(said, tuple) else (said, {})
        if not isinstance(logits_BC, Tensor) or logits_BC.shape != labels_BC.shape:
            raise ConfigError(
                f"the network returns {described(logits_BC)}; it must return logits of shape "
                f"{tuple(labels_BC.shape)}, images and classes"
            )
        alone = self.labels_alone(step)
        rows_BR = self.targets.rows(images_B, shown) if self.targets and not alone else None
        progress, labelled = step / self.num_steps, 1.0 if alone else self.labelled
        given = Shown(logits_BC, labels_BC, rows_BR, self.members, progress, labelled, also)
        return loss_by(self.method, given)


def loss_by(method: Learning, shown: Shown) -> Tensor:
    """The method's loss.

    Raises:
        ConfigError: it needs what only its learner returns, and the student trains without it.
    """
    try:
        return method.loss(shown)
    except KeyError as error:
        if shown.also:
            raise
        name = type(method).__name__
        raise ConfigError(
            f"{name}.loss looks up {error}, which the student alone does not return: train "
            f"what {name}().learner(student, peers, members) returns"
        ) from error


def check_classes(images: Images, num_classes: int, *, taught: bool) -> None:
    """Refuse images that nothing can be learned from, and labels that are no class.

    Raises:
        ConfigError: there is no image, or neither a label nor a teacher; or a label is not in
            range, which would count as none.
    """
    labels_N = images.labels_N
    require(len(labels_N) > 0, "the number of training images", 0, "at least 1")
    low, high = int(labels_N.min()), int(labels_N.max())
    wanted = f"in 0..{num_classes - 1} (num_classes is {num_classes}), or -1 where unknown"
    require(low >= -1 and high < num_classes, "labels_N", f"in {low}..{high}", wanted)
    wanted = "known for an image, or an ensemble given with a method that needs teachers"
    require(taught or high >= 0, "labels_N", "-1 for all images", wanted)


def check_answers(ensemble: Ensemble, images: Images, num_classes: int) -> None:
    """Refuse teachers that do not turn these images into logits.

    Raises:
        ConfigError: names the teacher.
    """
    few_N = torch.arange(2) % len(images)
    for name, member in zip(ensemble.names, ensemble.members, strict=True):
        first = next(member.parameters(), images.labels_N)
        with torch.inference_mode():
            said = member(images.batch(few_N).to(first.device))
        fits = isinstance(said, Tensor) and said.shape == (2, num_classes)
        wanted = f"for two images, logits of shape {(2, num_classes)}"
        require(fits, f"what the teacher {name!r} returns", described(said), wanted)
        finite = fits and bool(said.isfinite().all())
        require(finite, f"what the teacher {name!r} returns", "not finite", "finite: retrain it")


def check_shares(method: Learning) -> None:
    """Refuse several ranks for a method that must see a batch as a whole.

    Raises:
        ConfigError: the mean of the ranks' losses would not be the loss of the batch.
    """
    ranks = position()[1]
    if ranks > 1 and not method.by_image:
        raise ConfigError(
            f"recipe.devices is {ranks}, but {type(method).__name__} compares images of a batch "
            "with one another, and each device sees only its share of them: set recipe.devices "
            "to 1, or choose another method (or trust)"
        )


def check_labels(method: Learning, recipe: Recipe) -> None:
    """Refuse mixup together with a trust that reads labels.

    Raises:
        ConfigError: a mixed image has no label of its own.
    """
    if recipe.mixup and getattr(getattr(method, "trust", None), "reads_labels", False):
        raise ConfigError(
            f"recipe.mixup is {recipe.mixup}; it must be 0 with this method.trust: "
            "a mixed image has no label of its own"
        )


def check_teachers(method: Learning, members: Members) -> None:
    """Refuse the `unbiased` trust if only the biased member could teach.

    Raises:
        ConfigError: no other member has weight, or there is no member of that name.
    """
    trust = getattr(method, "trust", None)
    if isinstance(trust, Unbiased):
        trust.check(members)


def mixed(
    images_B: Tensor, labels_BC: Tensor, alpha: float, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """The batch mixed with itself in reverse order (mixup, Zhang et al., 2018, equation 1).

    Batches are shuffled already, so the reverse order pairs images at random.  An unlabelled
    image adds nothing to the pair's labels, which then sum to less than 1.
    """
    generator = torch.Generator().manual_seed(key("mixup", seed, step))
    wide = torch.full((2,), alpha, dtype=torch.float64)  # small samples underflow in float32
    gammas = torch._standard_gamma(wide, generator=generator)
    share = float(gammas[0] / gammas.sum())
    return (
        share * images_B + (1 - share) * images_B.flip(0),
        share * labels_BC + (1 - share) * labels_BC.flip(0),
    )
