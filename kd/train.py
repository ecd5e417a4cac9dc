"""fit(): the only training loop.  Teacher, assistants and students differ only in who teaches.

B batch, C classes.  What a step sees (which images, in which view, mixed how, at which learning
rate) is a pure function of the seed and the step's number, so a resumed run needs nothing but
the weights, the optimiser's state and that number to end in the same bits.
"""

import copy
import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kd.component import Refused
from kd.data import Augment, Images, order_for
from kd.ensemble import Ensemble, Targets, cache_pays, cached_targets, online_targets
from kd.methods import Method, hard_loss, label_probs
from kd.recipe import Recipe

CALM = "lower recipe.optimizer.lr, or set recipe.clip_norm"
"""What helps against training that diverges."""


class NonFiniteLoss(Refused):
    """The loss became infinite or not a number; the message names the step."""


class TeacherChanged(Refused):
    """A frozen member's parameters or buffers changed while the student trained."""


@dataclass(frozen=True)
class Epoch:
    """What one epoch showed."""

    number: int
    """From 1."""
    step: int
    """Steps done so far."""
    lr: float
    """Learning rate of the epoch's last step."""
    train_loss: float
    """Mean loss over the epoch's steps."""
    validation: Mapping[str, float] = field(default_factory=dict)
    """What the caller's `validate` returned; empty where it was not the turn."""
    images_per_second: float = 0.0
    """Training speed without validation; not reproducible, so kept out of the artifacts."""


class Checkpoint(Protocol):
    """Where fit() keeps its state between epochs; kd.artifacts has the one on disk."""

    def load(self) -> tuple[dict[str, Tensor], list[Epoch]] | None:
        """The last state saved and the epochs it covers, or None for a fresh start."""

    def save(self, state: dict[str, Tensor], history: list[Epoch]) -> None:
        """Replace the state by this one, atomically."""


def fit(
    model: nn.Module,
    images: Images,
    recipe: Recipe,
    *,
    seed: int,
    num_classes: int,
    epoch_steps: int | None = None,
    method: Method | None = None,
    ensemble: Ensemble | None = None,
    validate: Callable[[nn.Module], Mapping[str, float]] = lambda model: {},
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    checkpoint: Checkpoint | None = None,
) -> tuple[nn.Module, list[Epoch]]:
    """Train `model` in place, from labels alone or under an ensemble.

    Args:
        model: The network that learns; it is moved to the device of `images`.
        images: What it learns from: labelled images and, under an ensemble, unlabelled ones too,
            with the views that student and teachers are shown.
        recipe: The budget and how it is spent.
        seed: Decides the order of images, their views and their mixing.
        num_classes: C.
        epoch_steps: Steps in an epoch; by default one pass over `images`.  A role that sees
            labelled images alone is given the steps of the whole data, for an equal budget.
        method: How it learns from soft targets; needed with an ensemble, unused without.
        ensemble: Who teaches; None trains on labels alone.
        validate: Figures of the model on the validation split, called in evaluation mode.
        on_epoch: Called after each epoch.
        checkpoint: Where to resume from and to save to after each epoch.

    Returns:
        The trained network in evaluation mode (the running mean of the weights where the recipe
        keeps one, else `model` itself) and the epochs' figures.

    Raises:
        NonFiniteLoss: the loss of a step was infinite or not a number.
        TeacherChanged: a member was changed by training.
    """
    lesson = Lesson(images, recipe, seed, num_classes, method, ensemble)
    plan = Plan(recipe, epoch_steps or steps_in_epoch(len(images), recipe.batch_size))
    device = images.labels_N.device
    model = model.to(device).to(memory_format=torch.channels_last)
    optimizer = recipe.optimizer.build(model.parameters())
    mean = ema_of(model, recipe.ema)
    learned = model if mean is None else mean.module
    history = restore(checkpoint, model, mean, optimizer)
    fingerprint = ensemble.fingerprint() if ensemble else None

    for epoch in range(len(history), recipe.epochs):
        model.train()
        torch.manual_seed(key("epoch", seed, epoch))  # what dropout or a user's model draws from
        watch = LossWatch(device)
        started = time.perf_counter()
        for step in plan.steps(epoch):
            for group in optimizer.param_groups:
                group["lr"] = plan.lr(step)
            loss = lesson.loss(model, step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if recipe.clip_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
            optimizer.step()
            if mean is not None:
                mean.update_parameters(model)
            watch.see(step, loss.detach())
        train_loss = watch.mean(epoch + 1)
        check_finite(model, epoch + 1)
        seconds = time.perf_counter() - started
        learned.eval()
        history.append(
            Epoch(
                number=epoch + 1,
                step=plan.steps(epoch).stop,
                lr=plan.lr(plan.steps(epoch)[-1]),
                train_loss=train_loss,
                validation=dict(validate(learned)) if plan.validates(epoch) else {},
                images_per_second=plan.per_epoch * recipe.batch_size / seconds,
            )
        )
        on_epoch(history[-1])
        if checkpoint is not None:
            checkpoint.save(state_of(model, mean, optimizer), history)
    if ensemble and ensemble.fingerprint() != fingerprint:
        raise TeacherChanged("a teacher's parameters or buffers changed during training")
    return learned.eval(), history


class Lesson:
    """What a model is shown at each step, and how far it is from what it should say."""

    def __init__(
        self,
        images: Images,
        recipe: Recipe,
        seed: int,
        num_classes: int,
        method: Method | None,
        ensemble: Ensemble | None,
    ) -> None:
        self.images = images
        self.recipe = recipe
        self.seed = seed
        self.num_classes = num_classes
        self.method = method
        self.targets = targets_of(ensemble, method, images, recipe, num_classes)

    def loss(self, model: nn.Module, step: int) -> Tensor:
        """The loss of step `step`, a scalar; teachers see the very view that the model sees."""
        recipe, device = self.recipe, self.images.labels_N.device
        indices_B, views_B = batch_of(
            step, recipe.batch_size, len(self.images), self.images.augment, self.seed
        )
        indices_B, views_B = indices_B.to(device), views_B.to(device)
        images_B = self.images.batch(indices_B, views_B)
        labels_B = self.images.labels_N[indices_B]
        labels_BC = label_probs(labels_B, self.num_classes, recipe.label_smoothing)
        if recipe.mixup:
            images_B, labels_BC = mixed(images_B, labels_BC, recipe.mixup, self.seed, step)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            logits_BC = model(images_B)
        if self.targets is None or self.method is None:
            return hard_loss(logits_BC, labels_BC)
        return self.method.loss(logits_BC, self.targets(images_B, indices_B, views_B), labels_BC)


class Plan:
    """Which steps an epoch has, at which learning rate, and when it is validated."""

    def __init__(self, recipe: Recipe, per_epoch: int) -> None:
        self.recipe = recipe
        self.per_epoch = per_epoch
        self.total = per_epoch * recipe.epochs

    def steps(self, epoch: int) -> range:
        """Numbers of the steps of epoch `epoch`, from 0."""
        return range(epoch * self.per_epoch, (epoch + 1) * self.per_epoch)

    def lr(self, step: int) -> float:
        """The schedule at the middle of the step, so that no step is taken at rate 0."""
        return self.recipe.optimizer.lr * self.recipe.schedule.factor((step + 0.5) / self.total)

    def validates(self, epoch: int) -> bool:
        """Whether the validation split is looked at after epoch `epoch`."""
        done = epoch + 1
        return done % self.recipe.validate_every == 0 or done == self.recipe.epochs


def key(purpose: str, *parts: int) -> int:
    """A seed from whole numbers: neighbouring parts, and other purposes, give unrelated ones."""
    digest = hashlib.sha256(" ".join([purpose, *map(str, parts)]).encode()).digest()
    return int.from_bytes(digest[:4])  # PyTorch's CPU generator looks at 32 bits of its seed


def steps_in_epoch(num_images: int, batch_size: int) -> int:
    """Steps of one pass over the images, every batch full; at least 1."""
    return max(1, math.ceil(num_images / batch_size))


@lru_cache(maxsize=2)
def pass_of(seed: int, number: int, num_images: int, augment: Augment) -> tuple[Tensor, Tensor]:
    """The order (N,) of images in pass `number`, and the view (N,) that each shows in it."""
    return order_for(seed, number, num_images), augment.views_for(seed, number, num_images)


def batch_of(
    step: int, batch_size: int, num_images: int, augment: Augment, seed: int
) -> tuple[Tensor, Tensor]:
    """Indices (B,) and views (B,) of a step.

    Batches are cut from an endless chain of shuffled passes, so every batch is full, also at
    the end of a pass and where there are fewer images than a batch holds.
    """
    indices, views = [], []
    position = step * batch_size
    end = position + batch_size
    while position < end:
        number, offset = divmod(position, num_images)
        order_N, views_N = pass_of(seed, number, num_images, augment)
        chosen = order_N[offset : offset + end - position]
        indices.append(chosen)
        views.append(views_N[chosen])
        position += len(chosen)
    return torch.cat(indices), torch.cat(views)


def mixed(
    images_B: Tensor, labels_BC: Tensor, alpha: float, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """The batch mixed with itself in reverse order (mixup, Zhang et al., 2018, equation 1).

    Batches are shuffled already, so the reverse order pairs images at random.  An unlabelled
    image adds nothing to the pair's labels, which then sum to less than 1.
    """
    generator = torch.Generator().manual_seed(key("mixup", seed, step))
    gammas = torch._standard_gamma(torch.full((2,), alpha), generator=generator)
    share = float(gammas[0] / gammas.sum())
    return (
        share * images_B + (1 - share) * images_B.flip(0),
        share * labels_BC + (1 - share) * labels_BC.flip(0),
    )


def targets_of(
    ensemble: Ensemble | None,
    method: Method | None,
    images: Images,
    recipe: Recipe,
    num_classes: int,
) -> Targets | None:
    """Where a step's soft targets come from; None without an ensemble."""
    if ensemble is None or method is None:
        return None
    for member in ensemble.members:
        member.to(images.labels_N.device).to(memory_format=torch.channels_last)
    pays = recipe.mixup == 0 and cache_pays(images, num_classes, recipe.epochs)
    if recipe.targets == "cached" or (recipe.targets == "auto" and pays):
        return cached_targets(ensemble, method.temperature, images)
    return online_targets(ensemble, method.temperature)


class LossWatch:
    """Sums the losses of an epoch and remembers the first bad step, without asking the device.

    Reading a loss makes the host wait for the GPU; so the check is made there, and read once.
    """

    def __init__(self, device: torch.device) -> None:
        self.total = torch.zeros((), device=device)
        self.count = 0
        self.bad_step = torch.full((), -1, device=device)

    def see(self, step: int, loss: Tensor) -> None:
        """Take the loss of a step."""
        self.total += loss
        self.count += 1
        bad = (self.bad_step < 0) & ~torch.isfinite(loss)
        self.bad_step = torch.where(bad, step, self.bad_step)

    def mean(self, epoch: int) -> float:
        """The epoch's mean loss; NonFiniteLoss where a step's was not finite."""
        if (step := int(self.bad_step)) >= 0:
            raise NonFiniteLoss(f"the loss was not finite at step {step} (epoch {epoch}); {CALM}")
        return float(self.total) / self.count


def check_finite(model: nn.Module, epoch: int) -> None:
    """Refuse weights that are not finite, before they become a checkpoint."""
    finite = torch.stack([parameter.isfinite().all() for parameter in model.parameters()])
    if not finite.all():
        raise NonFiniteLoss(f"weights were not finite after epoch {epoch}; {CALM}")


def ema_of(model: nn.Module, decay: float | None) -> AveragedModel | None:
    """A running mean of the model's weights and buffers, or None."""
    if decay is None:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def state_of(
    model: nn.Module, mean: AveragedModel | None, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """All that the next epoch depends on, as copies that training cannot touch."""
    state = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    if mean is not None:
        state |= {f"mean/{name}": tensor for name, tensor in mean.state_dict().items()}
    for index, entries in optimizer.state_dict()["state"].items():
        for name, value in entries.items():
            if value is not None:
                state[f"optimizer/{index}/{name}"] = torch.as_tensor(value)
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}


def restore(
    checkpoint: Checkpoint | None,
    model: nn.Module,
    mean: AveragedModel | None,
    optimizer: torch.optim.Optimizer,
) -> list[Epoch]:
    """Put the checkpoint's state in place and return the epochs that are done."""
    loaded = checkpoint.load() if checkpoint is not None else None
    if loaded is None:
        return []
    state, history = loaded
    model.load_state_dict(part(state, "model/"))
    if mean is not None:
        mean.load_state_dict(part(state, "mean/"))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    entries: dict[int, dict[str, Tensor]] = {}
    for name, tensor in part(state, "optimizer/").items():
        index, entry = name.split("/")
        parameter = parameters[int(index)]
        if tensor.shape == parameter.shape:
            # In the parameter's memory order, which the fused optimisers take for granted.
            tensor = torch.empty_like(parameter, requires_grad=False).copy_(tensor)
        entries.setdefault(int(index), {})[entry] = tensor
    optimizer.load_state_dict({**copy.deepcopy(optimizer.state_dict()), "state": entries})
    return history


def part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose name begins with `prefix`, without it."""
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
