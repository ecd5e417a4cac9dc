"""Shared by the online methods: losses between networks that train together.

B batch, M networks (the student first), C classes.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from kd.component import component
from kd.methods.learner import Cohort
from kd.methods.learning import SOME, Learning, Needs
from kd.methods.losses import hard_loss, log_probs, soft_loss
from kd.methods.shown import Members, Shown


@component
class Together(Learning):
    """A method by which a student and its peers learn together, from labels and one another."""

    pool: bool = False
    """Whether to use unlabelled images too, as none of the papers does: learning from one another
    needs no labels, but where few images have one, so do few of each batch."""

    needs: ClassVar[Needs] = "peers"
    num_peers: ClassVar[range] = SOME
    alone: ClassVar[bool] = True

    @property
    def uses_pool(self) -> bool:
        """Whether it sees unlabelled images."""
        return self.pool

    def learner(
        self, student: nn.Module, peers: Sequence[nn.Module], members: Members | None = None
    ) -> nn.Module:
        """The whole cohort."""
        return Cohort(student, peers)


def hard_losses(logits_MBC: Tensor, shown: Shown) -> Tensor:
    """The sum of all networks' hard losses."""
    given = shown.label_probs_BC, shown.labelled
    return torch.stack([hard_loss(each_BC, *given) for each_BC in logits_MBC]).sum()


def target(logits_BC: Tensor, temperature: float) -> Tensor:
    """Log-probs of a peer as a target, detached."""
    return log_probs(logits_BC.detach(), temperature)


def pulled(logits_BC: Tensor, towards_BC: Tensor, temperature: float) -> Tensor:
    """The soft loss of one network towards another's logits, which are detached."""
    return soft_loss(logits_BC, target(towards_BC, temperature), temperature)


def mean_of_others(logits_MBC: Tensor, own: int) -> Tensor:
    """Log of the mean of all other networks' probabilities (B, C), detached."""
    others = torch.cat([logits_MBC[:own], logits_MBC[own + 1 :]])
    return target(others, 1.0).logsumexp(dim=0) - math.log(len(others))


def ramp(progress: float, share: float) -> float:
    """exp(-5 (1 - progress / share)^2) until progress is `share`, then 1 (Laine & Aila, 2017)."""
    return math.exp(-5 * (1 - min(progress / share, 1.0)) ** 2) if share else 1.0
