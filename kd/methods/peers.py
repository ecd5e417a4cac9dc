"""What the online methods share: losses between networks that learn together.

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
    """Whether unlabelled images are shown, too, as in none of the papers: what the networks say
    of one another needs no label, but where few images have one, few of a batch do."""

    needs: ClassVar[Needs] = "peers"
    num_peers: ClassVar[range] = SOME
    alone: ClassVar[bool] = True

    @property
    def uses_pool(self) -> bool:
        """Whether it is shown unlabelled images."""
        return self.pool

    def learner(
        self, student: nn.Module, peers: Sequence[nn.Module], members: Members | None = None
    ) -> nn.Module:
        """The whole cohort."""
        return Cohort(student, peers)


def hard_losses(logits_MBC: Tensor, shown: Shown) -> Tensor:
    """Everybody's hard loss, summed."""
    given = shown.label_probs_BC, shown.labelled
    return torch.stack([hard_loss(each_BC, *given) for each_BC in logits_MBC]).sum()


def target(logits_BC: Tensor, temperature: float) -> Tensor:
    """Log-probs of a peer, as a target: no gradient goes to whoever gave it."""
    return log_probs(logits_BC.detach(), temperature)


def pulled(logits_BC: Tensor, towards_BC: Tensor, temperature: float) -> Tensor:
    """The soft loss of one network to another's logits, which are held fast."""
    return soft_loss(logits_BC, target(towards_BC, temperature), temperature)


def mean_of_others(logits_MBC: Tensor, own: int) -> Tensor:
    """Log of the mean of all other networks' probabilities (B, C), as a target."""
    others = torch.cat([logits_MBC[:own], logits_MBC[own + 1 :]])
    return target(others, 1.0).logsumexp(dim=0) - math.log(len(others))


def ramp(progress: float, share: float) -> float:
    """exp(-5 (1 - progress / share)^2), then 1 (Laine & Aila, 2017): trust grows with training."""
    return math.exp(-5 * (1 - min(progress / share, 1.0)) ** 2) if share else 1.0
