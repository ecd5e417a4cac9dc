"""Continuation knowledge distillation (Jafari et al., Findings of EMNLP 2022)."""

from typing import ClassVar, Literal

from torch import Tensor

from kd.component import component, require
from kd.methods.annealed import annealing, logit_distances
from kd.methods.losses import wide
from kd.methods.shown import Shown
from kd.methods.taught import Taught


@component
class ContinuationKD(Taught):
    """(1 - psi) max(0, distance to annealed logits - margin * factor) + psi * hard loss.

    psi rises from 0 to 1 over `handover`, the factor in `levels` steps.  The distance is that of
    `annealed`; see there for what is our interpretation.
    """

    kind: Literal["continuation"] = "continuation"
    levels: int = 20
    """T_max: number of temperatures in the annealing, at least 1."""
    handover: float = 0.75
    """Share of the training after which only labels count, in (0, 1]; 150 of 200 epochs."""
    margin: float = 0.0
    """Distances up to margin * factor cost nothing; at least 0."""

    alone: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.levels >= 1, "levels", self.levels, "at least 1")
        require(0 < self.handover <= 1, "handover", self.handover, "in (0, 1]")
        require(self.margin >= 0, "margin", self.margin, "at least 0")

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Log-probabilities at temperature 1 equal the logits up to a constant."""
        return (1.0,)

    def share(self, progress: float) -> float:
        """1 - psi."""
        return 1 - min(progress / self.handover, 1.0)

    def soft(
        self, logits_BC: Tensor, soft_log_probs_BC: Tensor, temperature: float, shown: Shown
    ) -> Tensor:
        """How far each image's distance exceeds the margin (B,)."""
        factor = annealing(shown.progress / self.handover, self.levels)
        distance_B = logit_distances(logits_BC, factor * wide(soft_log_probs_BC))
        return (distance_B - self.margin * factor).clamp(min=0)
