"""Data-parallel training: each process (rank) learns from its share of every batch.

The result equals that of one device with the whole batch, up to the order of sums: gradients are
averaged over the ranks, and batch statistics are taken over the whole batch.

B batch.
"""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

PATIENCE = timedelta(days=7)
"""Timeout for ranks waiting for one another: long, since the others wait while the first evaluates
the trained network.  If a rank dies, kd.launch ends the others."""


def launched() -> bool:
    """Whether this process was launched as one of several ranks."""
    return "LOCAL_RANK" in os.environ


@contextmanager
def group(device: str) -> Iterator[None]:
    """Connect the ranks with one another while the block runs; nothing for a lone process.

    If the block raises, they stay connected until the process ends; otherwise the others would
    report the lost connection before this rank has reported the cause.
    """
    if not launched():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)
    yield
    wait_for_all()  # until the first rank has written its files
    gc.collect()  # DDP sits in a cycle and holds the group, whose threads must not outlive Python
    dist.destroy_process_group()


def position() -> tuple[int, int]:
    """(rank, ranks): (0, 1) for a lone process."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def spread(model: nn.Module, leaves_unused: Callable[[], bool]) -> nn.Module:
    """`model` wrapped in DistributedDataParallel; `model` itself for a lone process.

    Args:
        model: The network that learns.
        leaves_unused: Returns whether some parameters get no gradient.  DDP would wait for it
            forever unless it searches each step's graph for such parameters, and it warns if
            that was unnecessary, so we find out beforehand.
    """
    if not dist.is_initialized():
        return model
    return DistributedDataParallel(model, find_unused_parameters=any_rank(leaves_unused()))


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on any rank; `flag` itself for a lone process.

    All ranks must call this at the same point.  Only the CPUs communicate, without waiting for
    work queued on the GPUs, so calling it at each step is cheap.
    """
    if not dist.is_initialized():
        return flag
    said = torch.tensor(int(flag))
    dist.all_reduce(said, dist.ReduceOp.MAX)
    return bool(said)


def wait_for_all() -> None:
    """Wait until every rank gets here; nothing for a lone process."""
    any_rank(False)


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean of a tensor over all ranks; the tensor itself for a lone process."""
    if not dist.is_initialized():
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def with_global_statistics(model: nn.Module) -> nn.Module:
    """Replace the model's batch norms, in place, by ones over the whole batch.

    Parameters and buffers keep their names, so both forms can load each other's state.
    """
    if not dist.is_initialized():
        return model
    if any(parameter.is_cuda for parameter in model.parameters()):
        synced: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return synced
    for name, child in model.named_children():
        setattr(model, name, with_global_statistics(child))
    return GlobalBatchNorm.like(model) if isinstance(model, _BatchNorm) else model


class SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over all ranks, with the gradients summed over all ranks, too."""

    @staticmethod
    def forward(ctx: object, part: Tensor) -> Tensor:
        """The sum, on every rank."""
        total = part.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        """The sum of the ranks' gradients."""
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


class GlobalBatchNorm(_BatchNorm):
    """Batch normalisation over all ranks on a CPU, which nn.SyncBatchNorm does not support."""

    @classmethod
    def like(cls, other: _BatchNorm) -> "GlobalBatchNorm":
        """The same normalisation, sharing parameters and buffers."""
        made = cls.__new__(cls)
        made.__dict__ = other.__dict__
        return made

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (B, channels, ...) by the mean and variance over all ranks' B."""
        if not self.training:
            plain: Tensor = super().forward(input)
            return plain
        values = input.float()
        axes = [axis for axis in range(values.dim()) if axis != 1]
        count = values.numel() // values.shape[1] * dist.get_world_size()
        shape = [1, -1] + [1] * (values.dim() - 2)
        mean = SumOverRanks.apply(values.sum(axes)) / count
        centred = values - mean.view(shape)
        variance = SumOverRanks.apply(centred.square().sum(axes)) / count
        if self.track_running_stats:
            self._remember(mean.detach(), variance.detach() * count / (count - 1))
        normal: Tensor = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            normal = normal * self.weight.view(shape) + self.bias.view(shape)
        return normal.to(input.dtype)

    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        """Update the running statistics, as nn.BatchNorm2d does."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)
