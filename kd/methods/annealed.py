"""Annealed knowledge distillation (Jafari et al., EACL 2021, arXiv 2104.07163).

B batch, C classes.
"""

import math
from typing import ClassVar, Literal

from torch import Tensor

from kd.component import component, require
from kd.methods.losses import wide
from kd.methods.shown import Shown
from kd.methods.taught import Taught


@component
class AnnealedKD(Taught):
    """First the teachers' logits, scaled by a factor that rises to 1; then the labels alone.

    Stage 1: the squared distance to factor * logits; the factor rises to 1 in `levels` equal
    steps, as 1 - (T - 1) / T_max does when the temperature T falls from T_max to 1.  Stage 2: the
    hard loss.  Logits are centred, since a softmax ignores their mean, and the distance is
    1 / 2C times the sum, which is the limit of the soft loss at high temperatures (Hinton 2015,
    equation 4); both are our interpretation.  An ensemble's logits are the logarithm of
    its soft targets at temperature 1.
    """

    kind: Literal["annealed"] = "annealed"
    levels: int = 10
    """T_max: number of temperatures in the annealing, at least 1."""
    regression: float = 0.75
    """Share of the training spent in stage 1, in (0, 1]."""

    alone: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.levels >= 1, "levels", self.levels, "at least 1")
        require(0 < self.regression <= 1, "regression", self.regression, "in (0, 1]")

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Log-probabilities at temperature 1 equal the logits up to a constant."""
        return (1.0,)

    def share(self, progress: float) -> float:
        """The soft loss alone, then the hard loss alone."""
        return 1.0 if progress < self.regression else 0.0

    def soft(
        self, logits_BC: Tensor, soft_log_probs_BC: Tensor, temperature: float, shown: Shown
    ) -> Tensor:
        """The distance of each image to the annealed logits (B,)."""
        factor = annealing(shown.progress / self.regression, self.levels)
        return logit_distances(logits_BC, factor * wide(soft_log_probs_BC))


def annealing(progress: float, levels: int) -> float:
    """The factor at `progress`: rises from 1 / levels to 1 in equal steps."""
    return min(math.floor(progress * levels) + 1, levels) / levels


def logit_distances(logits_BC: Tensor, targets_BC: Tensor) -> Tensor:
    """1 / 2C times the squared distance of the centred logits of each image (B,)."""
    difference_BC = wide(logits_BC) - targets_BC
    centred_BC = difference_BC - difference_BC.mean(dim=1, keepdim=True)
    return 0.5 * centred_BC.square().mean(dim=1)
