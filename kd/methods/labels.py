"""Controls: labels alone, with or without smoothing.

A method is worth its teachers only if it beats these under the same budget.
"""

from typing import ClassVar, Literal

from torch import Tensor

from kd.component import component, require
from kd.methods.learning import Learning
from kd.methods.losses import hard_loss, smoothed
from kd.methods.shown import Shown


@component
class Labels(Learning):
    """Cross-entropy with labels, optionally smoothed (Szegedy et al., 2016, section 7)."""

    kind: Literal["labels"] = "labels"
    smoothing: float = 0.0
    """Share of a label's probability spread evenly over all classes, in [0, 1)."""

    alone: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(0 <= self.smoothing < 1, "smoothing", self.smoothing, "in [0, 1)")

    def loss(self, shown: Shown) -> Tensor:
        """The hard loss of a batch, a scalar."""
        return hard_loss(
            shown.logits_BC, smoothed(shown.label_probs_BC, self.smoothing), shown.labelled
        )
