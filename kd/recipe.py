"""Recipe: how long, how fast and in what way a network is trained, whatever its role."""

import math
from collections.abc import Iterable
from typing import Literal

import torch

from kd.component import component, require
from kd.data import Augment


@component
class SGD:
    """Stochastic gradient descent with momentum."""

    kind: Literal["sgd"] = "sgd"
    lr: float = 0.1
    """Learning rate at the schedule's peak, above 0."""
    momentum: float = 0.9
    """Share of the last update that goes on, in [0, 1)."""
    nesterov: bool = True
    """Look ahead along the momentum before taking the gradient; needs momentum above 0."""
    weight_decay: float = 5e-4
    """L2 penalty on every parameter, at least 0."""
    fused: bool = True
    """One kernel for all of them; false: PyTorch's own choice, which rounds differently."""

    def __post_init__(self) -> None:
        require(0 < self.lr < math.inf, "lr", self.lr, "above 0 and finite")
        require(0 <= self.momentum < 1, "momentum", self.momentum, "in [0, 1)")
        decays = 0 <= self.weight_decay < math.inf
        require(decays, "weight_decay", self.weight_decay, "at least 0 and finite")

    @property
    def remembers(self) -> tuple[str, ...]:
        """What it keeps of each parameter."""
        return ("momentum",) if self.momentum else ()

    def build(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser over `parameters`, fused: one kernel for all of them."""
        return torch.optim.SGD(
            parameters,
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.nesterov and self.momentum > 0,
            weight_decay=self.weight_decay,
            fused=self.fused or None,
        )


@component
class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2019)."""

    kind: Literal["adamw"] = "adamw"
    lr: float = 1e-3
    """Learning rate at the schedule's peak, above 0."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running mean and of the running square, each in [0, 1)."""
    weight_decay: float = 0.01
    """Share of each weight taken away per step, times the learning rate; at least 0."""
    fused: bool = True
    """One kernel for all of them; false: PyTorch's own choice, which rounds differently."""

    def __post_init__(self) -> None:
        require(0 < self.lr < math.inf, "lr", self.lr, "above 0 and finite")
        require(all(0 <= b < 1 for b in self.betas), "betas", self.betas, "each in [0, 1)")
        decays = 0 <= self.weight_decay < math.inf
        require(decays, "weight_decay", self.weight_decay, "at least 0 and finite")

    @property
    def remembers(self) -> tuple[str, ...]:
        """What it keeps of each parameter."""
        return ("mean", "square")

    def build(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser over `parameters`, fused: one kernel for all of them."""
        return torch.optim.AdamW(
            parameters,
            lr=self.lr,
            betas=self.betas,
            weight_decay=self.weight_decay,
            fused=self.fused or None,
        )


Optimizer = SGD | AdamW


@component
class Cosine:
    """Rise linearly from 0, then fall to 0 along half a cosine (Loshchilov & Hutter, 2017)."""

    kind: Literal["cosine"] = "cosine"
    warmup: float = 0.0
    """Share of the training spent rising, in [0, 1)."""

    def __post_init__(self) -> None:
        require(0 <= self.warmup < 1, "warmup", self.warmup, "in [0, 1)")

    def factor(self, progress: float) -> float:
        """What the peak learning rate is multiplied by once `progress` of the steps are done."""
        if progress < self.warmup:
            return progress / self.warmup
        return 0.5 * (1 + math.cos(math.pi * (progress - self.warmup) / (1 - self.warmup)))


@component
class Steps:
    """Rise linearly from 0, then multiply by `gamma` at each milestone."""

    kind: Literal["steps"] = "steps"
    milestones: tuple[float, ...] = (0.5, 0.75)
    """Shares of the training at which the learning rate drops, ascending, each in (0, 1)."""
    gamma: float = 0.1
    """What each milestone multiplies the learning rate by, in (0, 1]."""
    warmup: float = 0.0
    """Share of the training spent rising, in [0, 1)."""

    def __post_init__(self) -> None:
        ascending = list(self.milestones) == sorted(set(self.milestones))
        inside = all(0 < share < 1 for share in self.milestones)
        require(ascending and inside, "milestones", self.milestones, "ascending shares in (0, 1)")
        require(0 < self.gamma <= 1, "gamma", self.gamma, "in (0, 1]")
        require(0 <= self.warmup < 1, "warmup", self.warmup, "in [0, 1)")

    def factor(self, progress: float) -> float:
        """What the peak learning rate is multiplied by once `progress` of the steps are done."""
        rise = progress / self.warmup if progress < self.warmup else 1.0
        return rise * self.gamma ** sum(progress >= share for share in self.milestones)


Schedule = Cosine | Steps


@component
class Recipe:
    """A training budget and how it is spent.

    An epoch is one pass over the *whole* training data, the unlabelled pool included.  A role
    that learns from labels alone takes as many steps in an epoch, and so sees its few labelled
    images several times: equal epochs are equal budgets.
    """

    epochs: int = 30
    """Passes over the training data, at least 1."""
    batch_size: int = 64
    """Images in a step, at least 2 (batch normalisation needs a spread)."""
    optimizer: Optimizer = SGD()
    schedule: Schedule = Cosine()
    augment: Augment = Augment()
    """Random shifts and flips; student and teachers see the same view of an image."""
    mixup: float = 0.0
    """Parameter of the Beta distribution that images are mixed by (mixup); 0: never."""
    label_smoothing: float = 0.0
    """Share of a label's probability spread evenly over all classes, in [0, 1)."""
    clip_norm: float | None = None
    """Largest length of the gradient, above 0; null: no clipping."""
    ema: float | None = None
    """Decay of the running mean of the weights, in (0, 1), which is then kept (at first the plain
    mean: kd.methods.decay_at); null: no mean."""
    precision: Literal["fp32", "tf32", "bf16", "auto"] = "fp32"
    """bf16 runs the network's forward and backward in bfloat16 autocast; losses stay in fp32.
    A processor without bfloat16 instructions emulates them, which is many times slower: auto
    measures both on this machine once, and takes bf16 where that is faster by a fifth.  tf32: a
    GPU may round the factors of convolutions and matrix products to 10 bits of mantissa."""
    memory_format: Literal["channels_last", "contiguous", "auto"] = "channels_last"
    """How images and weights lie in memory; auto: as is faster on this machine."""
    compile: bool | Literal["auto"] = False
    """Compile the network with torch.compile, on a GPU as CUDA graphs; needs a C++ compiler.  auto
    measures, and compiles where the training is long enough to gain back what compiling takes."""
    deterministic: bool = True
    """Take only algorithms that give the same bits each time.  A CPU has no others; on a GPU,
    false lets convolutions be chosen by trying, and sums be taken in any order."""
    targets: Literal["auto", "cached", "online", "stacked"] = "auto"
    """online asks the teachers at each step, one by one; stacked asks teachers of one architecture
    all at once, which a GPU may prefer (a CPU does not); cached asks them once for every view of
    every image and keeps their answers under .kd/targets; auto caches where views are fewer than
    epochs, nothing is mixed and a member's answers take 4 GiB at most; else it asks online."""
    views: int | None = 16
    """Views of an image that a taught network is shown while targets are cached, at least 1: after
    so many passes they recur.  null: all views that `augment` has.  16 lost no accuracy beyond
    noise in 60 epochs (benchmarks/RECORDS.md); longer trainings want more."""
    threads: int = 1
    """CPU threads, at least 1.  Sums are taken in another order with another number of threads,
    so this belongs to what decides the result, not to what the machine happens to have."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU where there is one."""
    devices: int = 1
    """GPUs, or processes on a CPU, that share every batch, at least 1: for a large network."""
    checkpoint_minutes: float = 1.0
    """Minutes of training, at most, that a crash can lose; at least 0 (save at each step)."""
    checkpoint_steps: int | None = None
    """Steps between two checkpoints beside those by the clock, at least 1; null: the clock's."""
    validate_every: int = 1
    """Epochs between two looks at the validation split, at least 1; the last is always seen."""

    def __post_init__(self) -> None:
        for name in ("epochs", "threads", "devices", "validate_every"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.batch_size >= 2, "batch_size", self.batch_size, "at least 2")
        even = self.devices == 1 or self.batch_size % (2 * self.devices) == 0
        wanted = f"a multiple of {2 * self.devices}, twice recipe.devices"
        require(even, "batch_size", self.batch_size, wanted)
        for name in ("views", "checkpoint_steps"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1, or null")
        minutes = self.checkpoint_minutes
        require(minutes >= 0, "checkpoint_minutes", minutes, "at least 0")
        require(0 <= self.mixup < math.inf, "mixup", self.mixup, "at least 0 and finite")
        smoothing = self.label_smoothing
        require(0 <= smoothing < 1, "label_smoothing", smoothing, "in [0, 1)")
        clips = self.clip_norm is None or 0 < self.clip_norm < math.inf
        require(clips, "clip_norm", self.clip_norm, "above 0 and finite, or null")
        require(self.ema is None or 0 < self.ema < 1, "ema", self.ema, "in (0, 1)")
        if self.device == "cpu":
            wanted = "fp32 or bf16 where device is cpu: GPUs alone have TF32"
            require(self.precision != "tf32", "precision", self.precision, wanted)
        if self.targets == "cached":
            require(self.mixup == 0, "mixup", self.mixup, "0 when targets are cached")
