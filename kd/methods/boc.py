"""Online ensemble model compression, BOC-KD (Walawalkar et al., ECCV 2020).

M networks (the student first, the pseudo-teacher second), B batch, C classes, D features.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from kd.component import component, require
from kd.methods.learner import Answer, Cohort, last_linear
from kd.methods.peers import Together, hard_losses, pulled
from kd.methods.shown import Members, Shown


class AdaptedCohort(Cohort):
    """A cohort whose other networks match the first peer's features through linear adapters."""

    def __init__(self, student: nn.Module, peers: Sequence[nn.Module]) -> None:
        super().__init__(student, peers)
        wanted = last_linear(peers[0]).in_features
        others = [student, *peers[1:]]
        self.adapters = nn.ModuleList(
            nn.Linear(last_linear(network).in_features, wanted) for network in others
        )

    def answer(self, images: Tensor) -> Answer:
        """All logits, the pseudo-teacher's features and the others' adapted features."""
        logits_MBC, (student_BD, teacher_BD, *more) = self.answer_with_features(images)
        others = [student_BD, *more]
        adapted = [f(features) for f, features in zip(self.adapters, others, strict=True)]
        also = {"teacher_BD": teacher_BD.detach(), "adapted_PBD": torch.stack(adapted)}
        return logits_MBC[0], {"logits_MBC": logits_MBC, **also}


@component
class BOC(Together):
    """hard * hard losses + hints * feature distances + soft * divergences from the ensemble.

    The first peer is the pseudo-teacher, as large as the uncompressed network; the student and
    any further peers are smaller.  The ensemble is the mean of all logits, detached.  The paper
    compares three blocks through 1x1 adapters; here the features before the last layer are
    compared through a linear one, which fits any networks (our interpretation).
    """

    kind: Literal["boc"] = "boc"
    temperature: float = 2.0
    """Divides the logits before the softmax, above 0."""
    hard: float = 0.7
    """Weight of the hard losses, at least 0."""
    hints: float = 0.15
    """Weight of the mean squared distances of features, at least 0."""
    soft: float = 0.15
    """Weight of the divergences from the ensemble, at least 0."""

    def __post_init__(self) -> None:
        require(self.temperature > 0, "temperature", self.temperature, "above 0")
        for name in ("hard", "hints", "soft"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")

    def learner(
        self, student: nn.Module, peers: Sequence[nn.Module], members: Members | None = None
    ) -> nn.Module:
        """The cohort and its adapters."""
        return AdaptedCohort(student, peers)

    def loss(self, shown: Shown) -> Tensor:
        """The sum of all networks' losses."""
        logits_MBC, also = shown.also["logits_MBC"], shown.also
        ensemble_BC = logits_MBC.mean(dim=0)
        soft = [pulled(own_BC, ensemble_BC, self.temperature) for own_BC in logits_MBC]
        distances = (also["adapted_PBD"] - also["teacher_BD"]).square().mean(dim=(1, 2))
        hard = hard_losses(logits_MBC, shown)
        return (
            self.hard * hard + self.hints * distances.sum() + self.soft * torch.stack(soft).sum()
        )
