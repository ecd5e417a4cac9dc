"""Multi-level logit distillation (Jin, Wang and Lin, CVPR 2023).

B batch, C classes.
"""

from typing import Literal

from torch import Tensor

from kd.component import component, require
from kd.methods.losses import log_probs, soft_losses, wide
from kd.methods.shown import Shown
from kd.methods.taught import Taught


@component
class MLKD(Taught):
    """KD, likeness of images and likeness of classes, averaged over several temperatures.

    Likeness of images is P P', of classes P' P, with P (B, C) the probabilities; both are divided
    by B, and the squared differences summed, so that neither the batch's size nor the number of
    classes sets their scale (this project's own reading: the public code's sums grow with both).
    The public code adds the temperatures, 0.9 for each beside 0.1 for labels, where here they are
    averaged: alpha 0.978 and scale 4.6 weigh as it does.
    The published recipe shows a weak and a strong view and trains twice as long as what it is
    compared with; here it has one view and the recipe's budget like every other method.
    """

    kind: Literal["mlkd"] = "mlkd"
    temperatures: tuple[float, ...] = (2.0, 3.0, 4.0, 5.0, 6.0)
    """Above 0 each."""
    alpha: float = 0.9
    """Weight of the soft loss, in [0, 1]; the hard loss gets the rest."""
    images: float = 64.0
    """Weight of the likeness of images, at least 0; the public code's is the batch's size."""
    classes: float = 41.0
    """Weight of the likeness of classes, at least 0; the public code's is B^2 / C."""

    def __post_init__(self) -> None:
        super().__post_init__()
        above = len(self.temperatures) > 0 and all(each > 0 for each in self.temperatures)
        require(above, "temperatures", self.temperatures, "above 0 each, at least one")
        require(0 <= self.alpha <= 1, "alpha", self.alpha, "in [0, 1]")
        require(self.images >= 0, "images", self.images, "at least 0")
        require(self.classes >= 0, "classes", self.classes, "at least 0")

    def share(self, progress: float) -> float:
        """Alpha from beginning to end."""
        return self.alpha

    def soft(
        self, logits_BC: Tensor, soft_log_probs_BC: Tensor, temperature: float, shown: Shown
    ) -> Tensor:
        """The three distances of each image (B,), two of which all images share."""
        ours_BC = log_probs(logits_BC, temperature).exp()
        theirs_BC = wide(soft_log_probs_BC).exp()
        images = squared_distance(ours_BC @ ours_BC.T, theirs_BC @ theirs_BC.T)
        classes = squared_distance(ours_BC.T @ ours_BC, theirs_BC.T @ theirs_BC)
        relations = (self.images * images + self.classes * classes) / len(ours_BC) ** 2
        return soft_losses(logits_BC, soft_log_probs_BC, temperature) + relations


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """Sum of the squared differences of two tables."""
    return (a - b).square().sum()
