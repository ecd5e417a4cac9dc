"""One network on several devices: each process (rank) learns from its share of every batch.

The result is that of one device with the whole batch, but for the order of sums: gradients are
averaged over the ranks, and batch statistics are taken over the whole batch.

B batch.
"""

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
"""How long ranks wait for one another: the others, while the first measures what was trained.  Of
one that died they hear from kd.launch, which ends them."""


def launched() -> bool:
    """Whether this process is one rank of several."""
    return "LOCAL_RANK" in os.environ


@contextmanager
def group(device: str) -> Iterator[None]:
    """The ranks connected with one another while the block runs; nothing for a lone process.

    Where the block raises, they stay connected until the process ends: the others would hear of
    the lost connection, and complain of it, before this rank has told why.
    """
    if not launched():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)
    yield
    wait_for_all()  # nobody goes on before the first rank has written
    dist.destroy_process_group()


def position() -> tuple[int, int]:
    """(rank, ranks): (0, 1) for a lone process."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def spread(model: nn.Module, leaves_unused: Callable[[], bool]) -> nn.Module:
    """What to call in training in the place of `model`; itself for a lone process.

    Args:
        model: Who learns.
        leaves_unused: Says whether some parameters get no gradient.  DDP would wait for it for
            ever; to be told which ones, it looks through each step's graph, and warns where there
            was no need.  So we find out beforehand.
    """
    if not dist.is_initialized():
        return model
    return DistributedDataParallel(model, find_unused_parameters=any_rank(leaves_unused()))


def any_rank(flag: bool) -> bool:
    """Whether any rank says so, which all of them learn; `flag` itself for a lone process.

    Each rank must ask it at the same point.  It is settled between the hosts, without waiting for
    what their devices still have to do, so that it may be asked at each step.
    """
    if not dist.is_initialized():
        return flag
    said = torch.tensor(int(flag))
    dist.all_reduce(said, dist.ReduceOp.MAX)
    return bool(said)


def wait_for_all() -> None:
    """Go on once every rank is here; nothing for a lone process."""
    any_rank(False)


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean of a tensor over all ranks; the tensor itself for a lone process."""
    if not dist.is_initialized():
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def with_global_statistics(model: nn.Module) -> nn.Module:
    """The model with its batch norms replaced by ones that see the whole batch, in place.

    Parameters and buffers keep their names, so states go from one form into the other.
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
    """The sum of a tensor over all ranks; each rank's part gets the gradient of all their uses."""

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
    """Batch normalisation over all ranks' batches on a CPU, which nn.SyncBatchNorm does not do."""

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
        if not self.training or not dist.is_initialized():
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
        """Move the running statistics, as nn.BatchNorm2d does."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)
