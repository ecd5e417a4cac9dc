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
    """KD, image similarity and class similarity, averaged over several temperatures.

    With P (B, C) the probabilities, image similarity is P P' and class similarity P' P; both are
    divided by B, and the squared differences summed, so that neither batch size nor number of
    classes sets their scale (our interpretation: the public code's sums grow with both).
    The public code sums over temperatures, with weight 0.9 each and 0.1 for labels; here they are
    averaged, so alpha 0.978 and scale 4.6 give its weights.
    The published recipe uses a weak and a strong view and trains twice as long as its baselines;
    here it has one view and the recipe's budget, like every other method.
    """

    kind: Literal["mlkd"] = "mlkd"
    temperatures: tuple[float, ...] = (2.0, 3.0, 4.0, 5.0, 6.0)
    """Above 0 each."""
    alpha: float = 0.9
    """Weight of the soft loss, in [0, 1]; the hard loss gets the rest."""
    images: float = 64.0
    """Weight of image similarity, at least 0; in the public code it is the batch size."""
    classes: float = 41.0
    """Weight of class similarity, at least 0; in the public code it is B^2 / C."""

    def __post_init__(self) -> None:
        super().__post_init__()
        above = len(self.temperatures) > 0 and all(each > 0 for each in self.temperatures)
        require(above, "temperatures", self.temperatures, "above 0 each, at least one")
        require(0 <= self.alpha <= 1, "alpha", self.alpha, "in [0, 1]")
        require(self.images >= 0, "images", self.images, "at least 0")
        require(self.classes >= 0, "classes", self.classes, "at least 0")

    def share(self, progress: float) -> float:
        """Always alpha."""
        return self.alpha

    def soft(
        self, logits_BC: Tensor, soft_log_probs_BC: Tensor, temperature: float, shown: Shown
    ) -> Tensor:
        """The sum of three distances (B,); only the KL differs between images."""
        ours_BC = log_probs(logits_BC, temperature).exp()
        theirs_BC = wide(soft_log_probs_BC).exp()
        images = squared_distance(ours_BC @ ours_BC.T, theirs_BC @ theirs_BC.T)
        classes = squared_distance(ours_BC.T @ ours_BC, theirs_BC.T @ theirs_BC)
        relations = (self.images * images + self.classes * classes) / len(ours_BC) ** 2
        return soft_losses(logits_BC, soft_log_probs_BC, temperature) + relations


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """Sum of the squared differences of two tables."""
    return (a - b).square().sum()
