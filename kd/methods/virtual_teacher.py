"""Tf-KD_reg: a virtual teacher made from the labels (Yuan et al., CVPR 2020, arXiv 1909.11723).

B batch, C classes.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from kd.component import component, require
from kd.methods.learning import Learning
from kd.methods.losses import hard_loss, log_probs, smoothed, soft_losses
from kd.methods.shown import Shown


@component
class VirtualTeacher(Learning):
    """alpha T^2 KL(virtual teacher at T || student at T) + (1 - alpha) cross-entropy.

    The virtual teacher gives the label probability `correct` and spreads the rest evenly over the
    other classes.  Its logits are the log of that, softened like any teacher's and compared at
    the same temperature: our interpretation.  The public code divides *probabilities* by
    T, so that its teacher is nearly uniform, and compares at two temperatures.
    """

    kind: Literal["virtual_teacher"] = "virtual_teacher"
    temperature: float = 4.0
    """Divides the logits before the softmax, in teacher and student alike; above 0."""
    alpha: float = 0.5
    """Weight of the soft loss, in [0, 1]; the hard loss gets the rest."""
    correct: float = 0.99
    """Probability that the virtual teacher assigns to the label, in (0, 1)."""

    alone: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.temperature > 0, "temperature", self.temperature, "above 0")
        require(0 <= self.alpha <= 1, "alpha", self.alpha, "in [0, 1]")
        require(0 < self.correct < 1, "correct", self.correct, "in (0, 1)")

    def loss(self, shown: Shown) -> Tensor:
        """The loss of a batch, a scalar; unlabelled images add nothing."""
        num_classes = shown.logits_BC.shape[1]
        labelled_B = shown.label_probs_BC.sum(dim=1) > 0
        others = (1 - self.correct) / (num_classes - 1)
        virtual_BC = smoothed(shown.label_probs_BC, num_classes * others)
        filled_BC = torch.where(labelled_B[:, None], virtual_BC, torch.ones_like(virtual_BC))
        soft_BC = log_probs(filled_BC.log(), self.temperature)
        soft_B = soft_losses(shown.logits_BC, soft_BC, self.temperature) * labelled_B
        soft = soft_B.mean() / shown.labelled  # like the hard loss: both come from labels
        hard = hard_loss(shown.logits_BC, shown.label_probs_BC, shown.labelled)
        return self.alpha * soft + (1 - self.alpha) * hard
