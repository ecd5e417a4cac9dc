"""FFL: feature fusion learning (Kim et al., ICPR 2020, arXiv 1904.09058).

M networks (the student first), B batch, C classes, D features.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from kd.component import component, require
from kd.methods.learner import Answer, Cohort, last_linear
from kd.methods.losses import hard_loss
from kd.methods.peers import Together, hard_losses, pulled, ramp
from kd.methods.shown import Members, Shown


class FusedCohort(Cohort):
    """A cohort with one more classifier, on the features of all networks."""

    def __init__(self, student: nn.Module, peers: Sequence[nn.Module], width: int) -> None:
        super().__init__(student, peers)
        heads = [last_linear(network) for network in self.networks]
        self.fusion = nn.Sequential(
            nn.Linear(sum(head.in_features for head in heads), width, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, heads[0].out_features),
        )

    def answer(self, images: Tensor) -> Answer:
        """All networks' logits, and the fused classifier's as `fused_BC`."""
        logits_MBC, features = self.answer_with_features(images)
        fused_BC = self.fusion(torch.cat(features, dim=1))
        return logits_MBC[0], {"logits_MBC": logits_MBC, "fused_BC": fused_BC}


@component
class FFL(Together):
    """Hard losses + rise * weight * (KL(mean || fused) + sum over networks of KL(fused || own)).

    The mean is of logits; every target is detached.  The paper fuses feature maps by convolution;
    here the features before the last layer are fused, which fits any networks (our
    interpretation).  The student, the paper's sub-network, is what is kept.
    """

    kind: Literal["ffl"] = "ffl"
    temperature: float = 3.0
    """Divides the logits before the softmax, above 0."""
    weight: float = 1.0
    """Weight of the soft losses after the ramp, at least 0."""
    rise: float = 0.27
    """Share of the training in which the soft losses ramp up, in [0, 1]; 80 of 300 epochs."""
    width: int = 64
    """Number of features in the fused classifier, at least 1."""

    def __post_init__(self) -> None:
        require(self.temperature > 0, "temperature", self.temperature, "above 0")
        require(self.weight >= 0, "weight", self.weight, "at least 0")
        require(0 <= self.rise <= 1, "rise", self.rise, "in [0, 1]")
        require(self.width >= 1, "width", self.width, "at least 1")

    def learner(
        self, student: nn.Module, peers: Sequence[nn.Module], members: Members | None = None
    ) -> nn.Module:
        """The cohort and its fused classifier."""
        return FusedCohort(student, peers, self.width)

    def loss(self, shown: Shown) -> Tensor:
        """The sum of all losses."""
        logits_MBC, fused_BC = shown.also["logits_MBC"], shown.also["fused_BC"]
        soft = [pulled(fused_BC, logits_MBC.mean(dim=0), self.temperature)]
        soft += [pulled(own_BC, fused_BC, self.temperature) for own_BC in logits_MBC]
        hard = hard_losses(logits_MBC, shown)
        hard = hard + hard_loss(fused_BC, shown.label_probs_BC, shown.labelled)
        return hard + ramp(shown.progress, self.rise) * self.weight * torch.stack(soft).sum()
