"""fit(), alone or as one rank of several: what test_ranks.py compares."""

import gc
import json
import math
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kd import launch, methods
from kd.checkpoint import DiskCheckpoint
from kd.component import ConfigError
from kd.ensemble import Ensemble
from kd.train import NonFiniteLoss, Stopped, fit, ranks
from tests.learners import CLASSES, network, pictures, recipe


class Idle(nn.Module):
    """A network with a part that its answer does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network(0)
        self.idle = nn.Linear(3, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.inner(images)


def fitted(
    taught: bool = False, method: str = "", idle: bool = False, **settings: object
) -> dict[str, object]:
    """The losses of the epochs and the weights that training ended with."""
    ensemble = Ensemble((network(5), network(6)), (0.5, 0.5)) if taught else None
    how = getattr(methods, method or "KD")()
    torch.manual_seed(0)
    student = Idle() if idle else network(0)
    peers = [network(3) for _ in range(how.num_peers.start)]
    model, history = fit(
        how.learner(student, peers, ensemble.described() if ensemble else None),
        pictures(64),
        recipe(**settings),
        seed=0,
        num_classes=CLASSES,
        method=how if taught or method else None,
        ensemble=ensemble,
    )
    return {"losses": [epoch.train_loss for epoch in history], "weights": listed(model)}


def refused(**settings: object) -> dict[str, object]:
    """Why a training is refused."""
    try:
        fitted(**settings)
    except ConfigError as error:
        return {"error": str(error)}
    return {}


def resumed(asked: int) -> dict[str, object]:
    """A training with dropout: undisturbed; stopped by rank `asked` alone; and gone on with."""
    found = {}
    for name, seed, last in (("whole", 0, 99), ("stopped", 0, 6), ("resumed", 99, 99)):
        done: list[int] = []
        try:
            model, history = fit(
                network(seed, dropout=0.5),
                pictures(32),
                recipe(checkpoint_minutes=1e9),
                seed=0,
                num_classes=CLASSES,
                checkpoint=None if name == "whole" else DiskCheckpoint("resumed", []),
                on_step=done.append,
                stop=lambda: ranks.position()[0] == asked and len(done) + 1 == last,  # noqa: B023
            )
            losses = [epoch.train_loss for epoch in history]
            found[name] = {"losses": losses, "weights": listed(model)}
        except Stopped as stopped:
            found[name] = str(stopped)
    return found


class Bomb(nn.Module):
    """A network whose answer is not a number at its 8th call on one rank."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.inner, self.mine, self.calls = network(), ranks.position()[0] == rank, 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += self.training
        return self.inner(images) * (math.nan if self.mine and self.calls == 8 else 1.0)


def exploded(rank: int) -> dict[str, object]:
    """What all ranks say of a loss that was not finite on one of them."""
    try:
        fit(Bomb(rank), pictures(), recipe(), seed=0, num_classes=CLASSES)
    except NonFiniteLoss as error:
        return {"error": str(error)}
    return {}


def interrupted(rank: int) -> dict[str, object]:
    """A training in which one rank fails between two steps, for which the other waits."""

    def fail(epoch: object) -> None:
        if ranks.position()[0] == rank:
            raise ValueError("why")

    fit(network(), pictures(), recipe(), seed=0, num_classes=CLASSES, on_epoch=fail)
    return {}


def listed(model: nn.Module) -> dict[str, list[float]]:
    """Parameters and buffers as plain data."""
    return {name: tensor.flatten().tolist() for name, tensor in model.state_dict().items()}


if __name__ == "__main__":
    if "KD_RANKS" in os.environ:
        launch.become_rank()
    gc.disable()  # nothing is let go by luck
    with ranks.group("cpu"):
        found = globals()[sys.argv[1]](**json.loads(sys.argv[2]))
        everyone = [found] * ranks.position()[1]
        dist.all_gather_object(everyone, found)
    # What holds the group until Python ends can abort the process then.
    assert not any(isinstance(each, DistributedDataParallel) for each in gc.get_objects())
    if launch.is_first():
        print(json.dumps(everyone))
