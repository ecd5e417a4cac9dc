"""A gate that learns which teacher to trust (Zhu et al., CIKM 2020, arXiv 2011.04106).

B batch, K members, C classes, R = K C entries of a row.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd.component import component, require
from kd.methods.learner import Answer, Learner
from kd.methods.losses import constant, hard_loss, log_probs, soft_losses
from kd.methods.mixing import AllLogits, soft_targets
from kd.methods.shown import Members, Shown
from kd.methods.taught import SoftMethod, by_slot


class WithGate(Learner):
    """A student and a gate, initialised to zero so that teachers start at their own weights."""

    def __init__(self, student: nn.Module, num_members: int) -> None:
        super().__init__(student)
        self.gate = nn.Linear(2 * num_members, num_members)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def answer(self, images: Tensor) -> Answer:
        """The student's logits, and the gate's parameters: only the loss sees the teachers.

        As clones, which tell DDP that the parameters are used; a bare parameter has no grad_fn.
        """
        also = {"gate_weight": self.gate.weight.clone(), "gate_bias": self.gate.bias.clone()}
        return self.student(images), also


@component
class Gated(SoftMethod):
    """KD from a mixture whose weights for each image come from a gate trained with the student.

    The gate sees each teacher's entropy and top log-probability at temperature 1, and learns from
    the hard loss of the student's teacher mixture at temperature 1.  The student's loss gives it
    no gradient, or it would move the mixture towards the student.  Both are our
    interpretation: the paper's abstract names the gate, not its form.
    """

    kind: Literal["gated"] = "gated"

    alone: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.trust is None, "trust", self.trust, "null: the gate decides whom to trust")

    def learner(
        self, student: nn.Module, peers: Sequence[nn.Module], members: Members | None = None
    ) -> nn.Module:
        """The student and its gate."""
        return student if members is None else WithGate(student, len(members.names))

    def labels_alone(self, progress: float) -> bool:
        """Never: the gate learns from the teachers even if the soft loss has no weight."""
        return False

    def reduction(self, members: Members) -> AllLogits:
        """All logits: the gate's weights change as it learns."""
        return AllLogits()

    def targets(self, logits_BC: Tensor, shown: Shown) -> tuple[Tensor, Tensor]:
        """Log of the gated soft targets (1, B, C), and equal weights for all images (B,)."""
        members, logits_KBC = shown.members, self.said(shown)
        assert members is not None
        weights_BK = gate(logits_KBC, shown, members).detach()
        given = (weights_BK, self.temperatures, members.mixing, self.standardize)
        return soft_targets(logits_KBC, *given), weights_BK.new_ones(len(weights_BK))

    def soft(
        self, logits_BC: Tensor, soft_log_probs_BC: Tensor, temperature: float, shown: Shown
    ) -> Tensor:
        """T^2 KL of each image (B,)."""
        return soft_losses(logits_BC, soft_log_probs_BC, temperature)

    def exact_loss(self, shown: Shown) -> Tensor:
        """The student's loss and the gate's."""
        members, logits_KBC = shown.members, self.said(shown)
        assert members is not None
        given = (gate(logits_KBC, shown, members), (1.0,), members.mixing, self.standardize)
        (mixed_BC,) = soft_targets(logits_KBC, *given)
        gates = hard_loss(mixed_BC, shown.label_probs_BC, shown.labelled)
        return super().exact_loss(shown) + gates

    def said(self, shown: Shown) -> Tensor:
        """Every member's logits (K, B, C)."""
        assert shown.rows_BR is not None
        return by_slot(shown.rows_BR, shown.logits_BC.shape[1])


def gate(logits_KBC: Tensor, shown: Shown, members: Members) -> Tensor:
    """Each member's weight for each image (B, K), above 0; differentiable by the gate."""
    log_probs_KBC = log_probs(logits_KBC)
    entropy_KB = -(log_probs_KBC.exp() * log_probs_KBC).sum(dim=2)
    seen_BS = torch.cat([entropy_KB, log_probs_KBC.amax(dim=2)]).T
    scores_BK = F.linear(seen_BS, shown.also["gate_weight"], shown.also["gate_bias"])
    own_K = constant(members.weights_K, scores_BK.dtype, scores_BK.device).clamp(min=1e-12)
    # A weight that underflows to 0 would have a NaN gradient.
    return log_probs(scores_BK + own_K.log()).exp().clamp(min=1e-30)
