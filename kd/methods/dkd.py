"""Decoupled knowledge distillation (Zhao et al., CVPR 2022, arXiv 2203.08679).

B batch, C classes.
"""

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kd.component import component, require
from kd.methods.losses import log_probs, rescaled, wide
from kd.methods.shown import Shown
from kd.methods.taught import SoftMethod


@component
class DKD(SoftMethod):
    """T^2 (target KL(b_T || b_S) + others KL(p_T || p_S over the other classes)) (equation 7).

    b is the pair (probability of the label, probability of all other classes).  The paper's
    weights of 1 for the hard loss and for this one correspond to alpha 0.5 and scale 2.  For an
    unlabelled image the teachers' top class serves as label (our interpretation).
    With two classes the second term is zero: there is only one other class.
    """

    kind: Literal["dkd"] = "dkd"
    alpha: float = 0.5
    scale: float = 2.0
    target: float = 1.0
    """The paper's alpha, at least 0."""
    others: float = 8.0
    """The paper's beta, at least 0; 0.5 to 10 there, depending on teacher and student."""
    warmup: float = 0.08
    """Share of the training in which the soft loss rises from 0, in [0, 1); 20 of 240 epochs."""

    alone: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.target >= 0, "target", self.target, "at least 0")
        require(self.others >= 0, "others", self.others, "at least 0")
        require(0 <= self.warmup < 1, "warmup", self.warmup, "in [0, 1)")

    def soft(
        self, logits_BC: Tensor, soft_log_probs_BC: Tensor, temperature: float, shown: Shown
    ) -> Tensor:
        """The weighted sum of the two divergences of each image (B,)."""
        ours_BC, theirs_BC = log_probs(logits_BC, temperature), wide(soft_log_probs_BC)
        labels_B = labels_or_guesses(shown.label_probs_BC, theirs_BC)
        is_label_BC = torch.zeros_like(ours_BC).scatter(1, labels_B[:, None], 1.0).bool()
        ours_B2, our_others_BC = decoupled(ours_BC, is_label_BC)
        theirs_B2, their_others_BC = decoupled(theirs_BC, is_label_BC)
        target_B = (theirs_B2.exp() * (theirs_B2 - ours_B2)).sum(dim=1)
        others_B = (their_others_BC.exp() * (their_others_BC - our_others_BC)).sum(dim=1)
        rise = min(shown.progress / self.warmup, 1.0) if self.warmup else 1.0
        return rise * rescaled(self.target * target_B + self.others * others_B, temperature)


def labels_or_guesses(label_probs_BC: Tensor, soft_log_probs_BC: Tensor) -> Tensor:
    """The most probable label of each image, or the teachers' top class if unlabelled (B,)."""
    unlabelled_B = label_probs_BC.sum(dim=1) == 0
    return torch.where(unlabelled_B, soft_log_probs_BC.argmax(dim=1), label_probs_BC.argmax(dim=1))


def decoupled(log_probs_BC: Tensor, is_label_BC: Tensor) -> tuple[Tensor, Tensor]:
    """Log of (label, all others) (B, 2), and of each class given that it is not the label (B, C).

    All from log-probabilities: public code takes the log of a masked softmax, which can be NaN.
    The label's own entry of the second is 0, which adds nothing to the divergence.
    """
    others_BC = log_probs_BC.masked_fill(is_label_BC, -math.inf)
    others_B1 = others_BC.logsumexp(dim=1, keepdim=True)
    label_B1 = log_probs_BC.masked_fill(~is_label_BC, 0.0).sum(dim=1, keepdim=True)
    given_others_BC = (log_probs_BC - others_B1).masked_fill(is_label_BC, 0.0)
    return torch.cat([label_B1, others_B1], dim=1), given_others_BC
