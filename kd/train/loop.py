"""fit(): the only training loop.  Teacher, assistants and students differ only in who teaches.

B batch, C classes, S steps of an epoch.  A step's inputs (images, views, mixing, learning rate)
and random draws (dropout) are a pure function of the seed and the step's number, so a resumed run
needs only the weights, the optimiser's state and that number to give a bit-identical result.
"""

import time
from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from kd.component import ConfigError, Refused, is_out_of_memory, reason, require
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
"""Remedy for a training that diverges."""
UNTRAINED = "nothing had been learned yet: look for a division by 0 or log(0) in network and loss"
"""Remedy for a loss that was never finite."""


class NonFiniteLoss(Refused):
    """The loss or a weight became infinite or NaN; the message names the step or the epoch."""


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
        model: The network that learns, or what `method.learner` makes of it; it is moved to the
            device of `images`.
        images: The training images: labelled ones and, with an ensemble, unlabelled ones too,
            with the views that student and teachers see.
        recipe: The budget and how it is spent.
        seed: Decides the order of images, their views, mixing and dropout.
        num_classes: C.
        epoch_steps: Steps in an epoch; by default one pass over `images`.  A role that sees only
            labelled images gets as many steps as for all images, for an equal budget.
        method: How it learns; labels alone if None, or if it needs teachers and has none.
        ensemble: The teachers, if any; then `method` says how it learns from them.
        validate: Returns the model's validation metrics; the model is in eval mode.
        on_step: Called after each step with the number of steps done.
        on_epoch: Called after each epoch.
        on_resume: Called on resume with the epochs that are already done, if any.
        checkpoint: Where to resume from and save to, as often as the recipe says and at the end.
        tables: Where members' logits are kept for later trainings; None: nowhere.
        stop: Called after each step; once it returns true, the state is saved and training ends.

    Returns:
        The trained network in eval mode (the running mean of the weights if the recipe keeps one,
        else `model` itself) and the epochs' metrics.

    Raises:
        NonFiniteLoss: a loss or a weight became infinite or NaN.
        ConfigError: it needs too much memory, cannot be compiled here, or settings conflict.
        Refused: a step ran out of memory and its batch cannot be split.
        TeacherChanged: training changed a member.
        Stopped: `stop` returned true; the next call with the same checkpoint resumes.
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
    learns = any(each.requires_grad for each in model.parameters())
    wanted = "above 0: an Ensemble freezes its members, so give fit another network, or a copy"
    require(learns, "the number of the network's parameters with requires_grad", 0, wanted)
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
        training.model.train()  # validation left it in eval mode
        for step in range(first, plan.steps(epoch).stop):
            training.step(step)
            stopping = any_rank(stop())  # a signal reaches the ranks at different steps
            if checkpoint is not None and is_first() and saves.due(training.done, stopping):
                training.check(epoch + 1)
                checkpoint.save(training.state(), history)
            on_step(training.done)
            if stopping:
                wait_for_all()  # a rank that exits ends the others: let the first one save
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
        checkpoint.save(training.state(), history)  # a later generation may yet be stopped
    return training.learned().eval(), history


class Training:
    """A network in training: all state that changes from step to step, and its updates."""

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
        """Set a step's gradient, accumulated over parts that fit into memory; return its loss."""
        rank, ranks = position()
        device = self.watch.losses_S.device
        # At each step, so a resumed run draws the same.  Ranks have different dropout masks.
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
            loss = total = torch.empty(0)  # frees the graph, which holds the activations
            self.parts = halved(self.parts, self.lesson, self.model, error)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # cuBLAS and cuDNN cannot use PyTorch's cached memory
        return self.gradient(step)

    def check(self, epoch: int) -> None:
        """Raise NonFiniteLoss for non-finite losses or weights, before they are saved."""
        self.watch.check(self.done, epoch)
        finite = torch.stack([each.isfinite().all() for each in self.model.parameters()])
        if not finite.all():
            raise NonFiniteLoss(f"weights were not finite in epoch {epoch}; {CALM}")

    def learned(self) -> nn.Module:
        """The running mean of the weights if one is kept, else the model itself."""
        return self.model if self.mean is None else self.mean.network

    def state(self) -> dict[str, Tensor]:
        """Everything that later steps depend on."""
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
        """Restore the checkpoint's state, and return the epochs that it covers."""
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
    """Keeps an epoch's losses on the device and reads them together.

    Reading a loss makes the host wait for the GPU.
    """

    def __init__(self, num_steps: int, device: torch.device) -> None:
        self.losses_S = torch.zeros(num_steps, device=device)
        self.count = 0

    def see(self, step: int, loss: Tensor) -> None:
        """Record the loss of a step; an epoch's first step starts over."""
        within = step % len(self.losses_S)
        self.losses_S[within] = loss
        self.count = within + 1

    def seen(self) -> Tensor:
        """The epoch's losses so far."""
        return self.losses_S[: self.count]

    def check(self, done: int, epoch: int) -> None:
        """Raise NonFiniteLoss if a loss was not finite; `done` counts the steps of all epochs."""
        bad = (~self.seen().isfinite()).nonzero()
        if len(bad):
            step = done - self.count + int(bad[0])
            remedy = CALM if step else UNTRAINED
            raise NonFiniteLoss(
                f"the loss was not finite at step {step} (epoch {epoch}); {remedy}"
            )

    def mean(self) -> float:
        """The mean of the epoch's losses so far."""
        return float(self.seen().double().mean())

    def state(self) -> dict[str, Tensor]:
        """The losses so far, for a checkpoint."""
        return {"losses": self.seen()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""
        self.count = len(state["losses"])
        self.seen().copy_(state["losses"])


def compiled(model: nn.Module) -> nn.Module:
    """The compiled model; with CUDA graphs on a GPU: kernel launches limit small networks."""
    on_gpu = next(model.parameters()).is_cuda
    made = torch.compile(model, mode="reduce-overhead" if on_gpu else "default")
    return cast(nn.Module, made)
