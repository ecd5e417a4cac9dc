"""fit(): the only training loop.  Teacher, assistants and students differ only in who teaches.

B batch, C classes, S steps of an epoch.  What a step sees (which images, in which view, mixed how,
at which learning rate) and what it draws (dropout) is a pure function of the seed and the step's
number, so a resumed run needs nothing but the weights, the optimiser's state and that number to
end in the same bits.
"""

import time
from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from kd.component import ConfigError, Refused, is_out_of_memory, reason
from kd.data import Images, key
from kd.ensemble import Ensemble
from kd.launch import is_first
from kd.methods import Frozen, Learner, Learning, decay_at
from kd.recipe import Recipe
from kd.train.device import FORMATS, reseed
from kd.train.lesson import Lesson
from kd.train.memory import PROBE, check_memory, halved, predict_memory
from kd.train.plan import Plan, steps_in_epoch
from kd.train.ranks import (
    any_rank,
    mean_over_ranks,
    position,
    spread,
    wait_for_all,
    with_global_statistics,
)
from kd.train.state import (
    Checkpoint,
    Epoch,
    Saves,
    Stopped,
    joined,
    optimizer_state,
    part,
    restore_optimizer,
)
from kd.train.targets import Tables

CALM = "lower recipe.optimizer.lr, or set recipe.clip_norm"
"""What helps against training that diverges."""


class NonFiniteLoss(Refused):
    """The loss became infinite or not a number; the message names the step."""


class TeacherChanged(Refused):
    """A frozen member's parameters or buffers changed while the student trained."""


def fit(
    model: nn.Module,
    images: Images,
    recipe: Recipe,
    *,
    seed: int,
    num_classes: int,
    epoch_steps: int | None = None,
    method: Learning | None = None,
    ensemble: Ensemble | None = None,
    validate: Callable[[nn.Module], Mapping[str, float]] = lambda model: {},
    on_step: Callable[[int], None] = lambda done: None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    on_resume: Callable[[list[Epoch]], None] = lambda history: None,
    checkpoint: Checkpoint | None = None,
    tables: Tables | None = None,
    stop: Callable[[], bool] = lambda: False,
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
        on_step: Called after each step with the number of steps done.
        on_epoch: Called after each epoch.
        on_resume: Called with the epochs that were done before, where there are any.
        checkpoint: Where to resume from, and to save to as often as the recipe says, and
            at the end.
        tables: Where members' logits are kept for later trainings; None: nowhere.
        stop: Asked after each step; once it says yes, the state is saved and training ends.

    Returns:
        The trained network in evaluation mode (the running mean of the weights where the recipe
        keeps one, else `model` itself) and the epochs' figures.

    Raises:
        NonFiniteLoss: the loss of a step was infinite or not a number.
        ConfigError: it cannot fit into memory, or cannot be compiled here.
        TeacherChanged: a member was changed by training.
        Stopped: `stop` said yes; the next call with the same checkpoint goes on.
    """
    plan = Plan(recipe, epoch_steps or steps_in_epoch(len(images), recipe.batch_size))
    lesson = Lesson(
        images,
        recipe,
        seed,
        num_classes,
        method,
        ensemble,
        tables,
        num_steps=plan.total,
        stop=stop,
    )
    model = model.to(images.labels_N.device)
    check_memory(predict_memory(model, lesson, recipe, position()[1]), images, recipe)
    training = Training(model, lesson, plan)
    history = training.resume(checkpoint)
    resumed_at = training.done
    if history:
        on_resume(history)
    saves = Saves(recipe)
    fingerprint = ensemble.fingerprint() if ensemble else None

    for epoch in range(len(history), recipe.epochs):
        started, first = time.perf_counter(), training.done
        training.model.train()  # it was validated in evaluation mode
        for step in range(first, plan.steps(epoch).stop):
            training.step(step)
            stopping = any_rank(stop())  # each rank hears a signal at a step of its own
            if checkpoint is not None and is_first() and saves.due(training.done, stopping):
                training.check(epoch + 1)
                checkpoint.save(training.state(), history)
            on_step(training.done)
            if stopping:
                wait_for_all()  # who ends first ends all: not before the first has saved
                raise Stopped(f"stopped after step {training.done}; run it again to go on")
        training.check(epoch + 1)
        seconds = time.perf_counter() - started
        learned = training.learned().eval()
        history.append(
            Epoch(
                number=epoch + 1,
                step=training.done,
                lr=plan.lr(training.done - 1),
                train_loss=training.watch.mean(),
                validation=dict(validate(learned)) if plan.validates(epoch) else {},
                images_per_second=(training.done - first) * recipe.batch_size / seconds,
            )
        )
        on_epoch(history[-1])
    if ensemble and ensemble.fingerprint() != fingerprint:
        raise TeacherChanged("a teacher's parameters or buffers changed during training")
    if checkpoint is not None and is_first() and training.done > resumed_at:
        checkpoint.save(training.state(), history)  # who learns from this network may be stopped
    return training.learned().eval(), history


class Training:
    """A network in training: all that changes from step to step, and how."""

    def __init__(self, model: nn.Module, lesson: Lesson, plan: Plan) -> None:
        memory_format = FORMATS[plan.recipe.memory_format]
        self.model = with_global_statistics(model).to(memory_format=memory_format)
        self.model.train()
        self.network = spread(
            compiled(self.model) if plan.recipe.compile else self.model,
            lambda: lesson.leaves_unused(self.model, PROBE),
        )
        self.lesson = lesson
        self.plan = plan
        self.recipe = plan.recipe
        self.optimizer = self.recipe.optimizer.build(model.parameters())
        self.mean = Frozen(model) if self.recipe.ema is not None else None
        self.watch = LossWatch(plan.per_epoch, next(model.parameters()).device)
        self.parts = 1
        self.done = 0

    def step(self, step: int) -> None:
        """Learn from one batch."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.lr(step)
        loss = self.gradient(step)
        if self.recipe.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        self.optimizer.step()
        if isinstance(self.model, Learner):
            self.model.after_step(step + 1)
        if self.mean is not None and self.recipe.ema is not None:
            self.mean.follow(self.model, decay_at(step, self.recipe.ema))
        self.watch.see(step, mean_over_ranks(loss))
        self.done = step + 1

    def gradient(self, step: int) -> Tensor:
        """Set the gradient of a step's loss, in as many parts as fit into memory; the loss."""
        rank, ranks = position()
        device = self.watch.losses_S.device
        # Anew at each step: a resumed run draws the same.  Each rank drops units of its own.
        reseed(device, key("step", self.lesson.seed, step) + rank)
        try:
            self.optimizer.zero_grad(set_to_none=True)
            total = torch.zeros((), device=device)
            for part in range(self.parts):
                share, shares = rank + ranks * part, ranks * self.parts
                loss = self.lesson.loss(self.network, step, share, shares) / self.parts
                loss.backward()
                total += loss.detach()
            return total
        except torch._dynamo.exc.TorchDynamoException as error:
            raise ConfigError(
                "recipe.compile is true, but the network cannot be compiled here "
                f"({reason(error)}): set it to false, or install what is missing"
            ) from error
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            loss = total = torch.empty(0)  # its graph holds the activations that did not fit
            self.parts = halved(self.parts, self.lesson, self.model, error)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what PyTorch holds in reserve, cuBLAS and cuDNN cannot have
        return self.gradient(step)

    def check(self, epoch: int) -> None:
        """Refuse losses and weights that are not finite, before they become a checkpoint."""
        self.watch.check(self.done, epoch)
        finite = torch.stack([each.isfinite().all() for each in self.model.parameters()])
        if not finite.all():
            raise NonFiniteLoss(f"weights were not finite in epoch {epoch}; {CALM}")

    def learned(self) -> nn.Module:
        """What is trained: the running mean where one is kept."""
        return self.model if self.mean is None else self.mean.network

    def state(self) -> dict[str, Tensor]:
        """All that the steps to come depend on."""
        return joined(
            {
                "model": self.model.state_dict(),
                "mean": {} if self.mean is None else self.mean.state_dict(),
                "optimizer": optimizer_state(self.optimizer),
                "watch": self.watch.state(),
                "progress": {"done": torch.tensor(self.done)},
            }
        )

    def resume(self, checkpoint: Checkpoint | None) -> list[Epoch]:
        """Put the checkpoint's state in place, and return the epochs that it covers."""
        loaded = checkpoint.load() if checkpoint is not None else None
        if loaded is None:
            return []
        state, history = loaded
        self.model.load_state_dict(part(state, "model"))
        if self.mean is not None:
            self.mean.load_state_dict(part(state, "mean"))
        restore_optimizer(self.optimizer, part(state, "optimizer"))
        self.watch.restore(part(state, "watch"))
        self.done = int(part(state, "progress")["done"])
        return history


class LossWatch:
    """Keeps an epoch's losses on the device, without asking it for them.

    Reading a loss makes the host wait for the GPU, so they are read together.
    """

    def __init__(self, num_steps: int, device: torch.device) -> None:
        self.losses_S = torch.zeros(num_steps, device=device)
        self.count = 0

    def see(self, step: int, loss: Tensor) -> None:
        """Take the loss of a step; an epoch's first one begins anew."""
        within = step % len(self.losses_S)
        self.losses_S[within] = loss
        self.count = within + 1

    def seen(self) -> Tensor:
        """The epoch's losses so far."""
        return self.losses_S[: self.count]

    def check(self, done: int, epoch: int) -> None:
        """NonFiniteLoss where a loss was not finite; `done` steps were taken in all epochs."""
        bad = (~self.seen().isfinite()).nonzero()
        if len(bad):
            step = done - self.count + int(bad[0])
            raise NonFiniteLoss(f"the loss was not finite at step {step} (epoch {epoch}); {CALM}")

    def mean(self) -> float:
        """The mean of the losses seen."""
        return float(self.seen().double().mean())

    def state(self) -> dict[str, Tensor]:
        """What was seen."""
        return {"losses": self.seen()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave."""
        self.count = len(state["losses"])
        self.seen().copy_(state["losses"])


def compiled(model: nn.Module) -> nn.Module:
    """The model compiled; on a GPU as CUDA graphs, since small networks wait for launches."""
    on_gpu = next(model.parameters()).is_cuda
    made = torch.compile(model, mode="reduce-overhead" if on_gpu else "default")
    return cast(nn.Module, made)
