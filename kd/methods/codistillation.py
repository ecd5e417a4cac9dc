"""Codistillation with stale peers (Anil et al., ICLR 2018, arXiv 1804.03235).

M networks (the student first), B batch, C classes.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from kd.component import component, require
from kd.methods.learner import Answer, Cohort, Frozen
from kd.methods.losses import soft_loss
from kd.methods.peers import Together, hard_losses, mean_of_others
from kd.methods.shown import Members, Shown


class StaleCohort(Cohort):
    """A cohort whose networks learn from copies of each other that are some steps old."""

    def __init__(self, student: nn.Module, peers: Sequence[nn.Module], every: int) -> None:
        super().__init__(student, peers)
        self.every = every
        self.stale = nn.ModuleList(Frozen(network) for network in self.networks)

    def answer(self, images: Tensor) -> Answer:
        """All networks' logits, and the stale copies'."""
        logits_BC, also = super().answer(images)
        stale_MBC = torch.stack([copy(images) for copy in self.stale])
        return logits_BC, {**also, "stale_MBC": stale_MBC}

    def after_step(self, done: int) -> None:
        """Renew the copies every `every` steps; at first each step, so that none is untrained."""
        if done % self.every == 0 or done < self.every:
            for copy, network in zip(self.stale, self.networks, strict=True):
                assert isinstance(copy, Frozen)
                copy.follow(network)


@component
class Codistillation(Together):
    """Each: hard loss + weight * KL(mean of the others' probabilities || own) (algorithm 1).

    The paper's cross-entropy and this divergence have the same gradient.  All see the same data.
    """

    kind: Literal["codistillation"] = "codistillation"
    every: int = 50
    """Steps between two exchanges of weights, at least 1."""
    burn_in: float = 0.2
    """Share of the training, at its start, with the hard loss alone, in [0, 1)."""
    weight: float = 1.0
    """Weight of the divergence (the hard loss has 1), at least 0."""

    def __post_init__(self) -> None:
        require(self.every >= 1, "every", self.every, "at least 1")
        require(0 <= self.burn_in < 1, "burn_in", self.burn_in, "in [0, 1)")
        require(self.weight >= 0, "weight", self.weight, "at least 0")

    def learner(
        self, student: nn.Module, peers: Sequence[nn.Module], members: Members | None = None
    ) -> nn.Module:
        """The cohort and its stale copies."""
        return StaleCohort(student, peers, self.every)

    def loss(self, shown: Shown) -> Tensor:
        """The sum of all networks' losses."""
        logits_MBC, stale_MBC = shown.also["logits_MBC"], shown.also["stale_MBC"]
        hard = hard_losses(logits_MBC, shown)
        if shown.progress < self.burn_in:
            return hard
        soft = [
            soft_loss(own_BC, mean_of_others(stale_MBC, own), 1.0)
            for own, own_BC in enumerate(logits_MBC)
        ]
        return hard + self.weight * torch.stack(soft).sum()
