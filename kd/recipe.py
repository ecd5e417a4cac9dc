"""Recipe: how long, how fast and in what way a network is trained, in any role."""

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
    """Share of the last update that is kept, in [0, 1)."""
    nesterov: bool = True
    """Nesterov momentum; has no effect if momentum is 0."""
    weight_decay: float = 5e-4
    """L2 penalty on every parameter, at least 0."""
    fused: bool = True
    """One kernel for all parameters; false: PyTorch's default, which rounds differently."""

    def __post_init__(self) -> None:
        require(0 < self.lr < math.inf, "lr", self.lr, "above 0 and finite")
        require(0 <= self.momentum < 1, "momentum", self.momentum, "in [0, 1)")
        decays = 0 <= self.weight_decay < math.inf
        require(decays, "weight_decay", self.weight_decay, "at least 0 and finite")

    @property
    def remembers(self) -> tuple[str, ...]:
        """What it stores per parameter."""
        return ("momentum",) if self.momentum else ()

    def build(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser over `parameters`."""
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
    """Share of each weight subtracted per step, times the learning rate; at least 0."""
    fused: bool = True
    """One kernel for all parameters; false: PyTorch's default, which rounds differently."""

    def __post_init__(self) -> None:
        require(0 < self.lr < math.inf, "lr", self.lr, "above 0 and finite")
        require(all(0 <= b < 1 for b in self.betas), "betas", self.betas, "each in [0, 1)")
        decays = 0 <= self.weight_decay < math.inf
        require(decays, "weight_decay", self.weight_decay, "at least 0 and finite")

    @property
    def remembers(self) -> tuple[str, ...]:
        """What it stores per parameter."""
        return ("mean", "square")

    def build(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser over `parameters`."""
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
    """Rise linearly from 0, then fall to 0 along a half cosine (Loshchilov & Hutter, 2017)."""

    kind: Literal["cosine"] = "cosine"
    warmup: float = 0.0
    """Share of the training spent rising, in [0, 1)."""

    def __post_init__(self) -> None:
        require(0 <= self.warmup < 1, "warmup", self.warmup, "in [0, 1)")

    def factor(self, progress: float) -> float:
        """The factor on the peak learning rate once `progress` of the steps are done."""
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
    """Factor on the learning rate at each milestone, in (0, 1]."""
    warmup: float = 0.0
    """Share of the training spent rising, in [0, 1)."""

    def __post_init__(self) -> None:
        ascending = list(self.milestones) == sorted(set(self.milestones))
        inside = all(0 < share < 1 for share in self.milestones)
        require(ascending and inside, "milestones", self.milestones, "ascending shares in (0, 1)")
        require(0 < self.gamma <= 1, "gamma", self.gamma, "in (0, 1]")
        require(0 <= self.warmup < 1, "warmup", self.warmup, "in [0, 1)")

    def factor(self, progress: float) -> float:
        """The factor on the peak learning rate once `progress` of the steps are done."""
        rise = progress / self.warmup if progress < self.warmup else 1.0
        return rise * self.gamma ** sum(progress >= share for share in self.milestones)


Schedule = Cosine | Steps


@component
class Recipe:
    """A training budget and how it is spent.

    An epoch is one pass over the *whole* training data, the unlabelled pool included.  A role
    that learns from labels alone takes as many steps per epoch, and so sees its few labelled
    images several times: equal epochs are equal budgets.
    """

    epochs: int = 30
    """Passes over the training data, at least 1."""
    batch_size: int = 64
    """Images per step, at least 2 (batch normalisation needs variance)."""
    optimizer: Optimizer = SGD()
    schedule: Schedule = Cosine()
    augment: Augment = Augment()
    """Random shifts and flips; student and teachers see the same view of each image."""
    mixup: float = 0.0
    """Mixup: parameter of the Beta distribution of the mixing factor; 0: no mixup."""
    label_smoothing: float = 0.0
    """Share of a label's probability that is spread over all classes, in [0, 1)."""
    clip_norm: float | None = None
    """Largest norm of the gradient, above 0; null: no clipping."""
    ema: float | None = None
    """Decay of the EMA of the weights, in (0, 1), which is then the result (at first a plain mean:
    kd.methods.decay_at); null: no EMA."""
    precision: Literal["fp32", "tf32", "bf16", "auto"] = "fp32"
    """bf16 runs the network's forward and backward in bfloat16 autocast; losses stay in fp32.
    A processor without bfloat16 instructions emulates them, which is many times slower: auto
    measures both on this machine once, and picks bf16 if that is faster by a fifth.  tf32: a
    GPU may round the factors of convolutions and matrix products to 10 bits of mantissa."""
    memory_format: Literal["channels_last", "contiguous", "auto"] = "channels_last"
    """Memory layout of images and weights; auto: the faster one on this machine."""
    compile: bool | Literal["auto"] = False
    """Compile the network with torch.compile, on a GPU with CUDA graphs; needs a C++ compiler.
    auto measures, and compiles if training is long enough to make up for the compile time."""
    deterministic: bool = True
    """Use only algorithms whose results are bit-identical each time.  A CPU has no others; on a
    GPU, false lets convolutions be autotuned and sums be taken in any order."""
    targets: Literal["auto", "cached", "online", "stacked"] = "auto"
    """online runs the teachers at each step, one by one; stacked runs teachers of one architecture
    all at once, which may be faster on a GPU (not on a CPU); cached runs them once on every view
    of every image and keeps their logits under .kd/targets; auto: cached if there are fewer views
    than epochs, no mixup, and at most 4 GiB of logits per member, else online."""
    views: int | None = 16
    """Views of an image that a taught network is shown while targets are cached, at least 1: after
    so many passes they recur.  null: all views that `augment` has.  16 lost no accuracy beyond
    noise in 60 epochs (benchmarks/RECORDS.md); longer trainings need more."""
    threads: int = 1
    """CPU threads, at least 1.  Their number changes the order of sums and so the result: hence a
    setting, rather than whatever the machine has."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one."""
    devices: int = 1
    """GPUs, or processes on a CPU, that share every batch, at least 1: for a large network."""
    checkpoint_minutes: float = 1.0
    """Minutes of training, at most, that a crash can lose; at least 0 (save at each step)."""
    checkpoint_steps: int | None = None
    """Steps between checkpoints in addition to the timed ones, at least 1; null: only timed."""
    validate_every: int = 1
    """Epochs between two validations, at least 1; the last epoch is always validated."""

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
            wanted = "fp32 or bf16 if device is cpu: only GPUs have TF32"
            require(self.precision != "tf32", "precision", self.precision, wanted)
        if self.targets == "cached":
            require(self.mixup == 0, "mixup", self.mixup, "0 when targets are cached")
