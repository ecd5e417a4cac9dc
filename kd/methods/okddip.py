"""OKDDip: online distillation with diverse peers (Chen et al., AAAI 2020, arXiv 1912.00350).

M networks (the student first), P auxiliary peers, B batch, C classes, D features, A attention.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from kd.component import component, require
from kd.methods.learner import Answer, Cohort, last_linear, with_features
from kd.methods.losses import log_probs, soft_loss, wide
from kd.methods.peers import Together, hard_losses, ramp
from kd.methods.shown import Members, Shown


class AttentiveCohort(Cohort):
    """A cohort whose auxiliary peers learn attention over one another."""

    def __init__(
        self, student: nn.Module, peers: Sequence[nn.Module], width: int, detach: bool = True
    ) -> None:
        super().__init__(student, peers)
        self.detach = detach
        sizes = [last_linear(peer).in_features for peer in peers]
        self.queries = nn.ModuleList(nn.Linear(size, width, bias=False) for size in sizes)
        self.keys = nn.ModuleList(nn.Linear(size, width, bias=False) for size in sizes)

    def answer(self, images: Tensor) -> Answer:
        """All networks' logits, and the peers' attention to one another (B, P, P)."""
        student_BC = self.student(images)
        answers = [with_features(peer, images) for peer in self.peers]
        seen = [features.detach() if self.detach else features for _, features in answers]
        queries_BPA = torch.stack([q(h) for q, h in zip(self.queries, seen, strict=True)], 1)
        keys_BPA = torch.stack([k(h) for k, h in zip(self.keys, seen, strict=True)], 1)
        with torch.autocast(images.device.type, enabled=False):  # else rows may not sum to 1
            scores_BPP = wide(queries_BPA) @ wide(keys_BPA).transpose(1, 2)
            attention_BPP = scores_BPP.softmax(dim=2)
        logits_MBC = torch.stack([wide(student_BC), *(logits for logits, _ in answers)])
        return student_BC, {"logits_MBC": logits_MBC, "attention_BPP": attention_BPP}


@component
class OKDDip(Together):
    """All hard losses + KL of peers to their attended mean, of the leader to the peers' mean.

    The student is the group leader.  Means are of logits (equations 4 and 8).  In the public code
    gradients also flow through the targets into peers and features; here, unless `detach` is
    false, only the attention gets them, which has no other source of gradients.
    """

    kind: Literal["okddip"] = "okddip"
    temperature: float = 3.0
    """Divides the logits before the softmax, above 0."""
    weight: float = 1.0
    """Weight of the soft losses after the ramp (the hard losses have 1), at least 0."""
    rise: float = 0.27
    """Share of the training in which the soft losses ramp up, in [0, 1]; 80 of 300 epochs."""
    width: int = 32
    """Size of queries and keys, at least 1."""
    detach: bool = True
    """Whether a peer gets no gradient through its use as a target and through attention."""

    num_peers: ClassVar[range] = range(2, 100)

    def __post_init__(self) -> None:
        require(self.temperature > 0, "temperature", self.temperature, "above 0")
        require(self.weight >= 0, "weight", self.weight, "at least 0")
        require(0 <= self.rise <= 1, "rise", self.rise, "in [0, 1]")
        require(self.width >= 1, "width", self.width, "at least 1")

    def learner(
        self, student: nn.Module, peers: Sequence[nn.Module], members: Members | None = None
    ) -> nn.Module:
        """The cohort and its attention."""
        return AttentiveCohort(student, peers, self.width, self.detach)

    def loss(self, shown: Shown) -> Tensor:
        """The sum of all networks' losses."""
        logits_MBC, attention_BPP = wide(shown.also["logits_MBC"]), shown.also["attention_BPP"]
        leader_BC, peers_PBC = logits_MBC[0], logits_MBC[1:]
        given_PBC = peers_PBC.detach() if self.detach else peers_PBC
        attended_PBC = torch.einsum("bpq,qbc->pbc", attention_BPP.to(given_PBC), given_PBC)
        soft = [
            soft_loss(own_BC, log_probs(to_BC, self.temperature), self.temperature)
            for own_BC, to_BC in zip(peers_PBC, attended_PBC, strict=True)
        ]
        to_BC = log_probs(given_PBC.mean(dim=0), self.temperature)
        soft.append(soft_loss(leader_BC, to_BC, self.temperature))
        rise = ramp(shown.progress, self.rise)
        hard = hard_losses(logits_MBC, shown)
        return hard + rise * self.weight * torch.stack(soft).sum()
