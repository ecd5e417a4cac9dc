"""The inputs of a loss: tensors, never models.

B batch, K members, C classes, R entries of a row.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

Mixing = Literal["probabilities", "logits"]


@dataclass(frozen=True)
class Members:
    """What a method may know about its teachers: their names, weights and mixing."""

    names: tuple[str, ...]
    weights_K: tuple[float, ...]
    """At least 0 each, summing to 1."""
    mixing: Mixing = "probabilities"
    """probabilities: sum_k w_k softmax(z_k / T), equivalent to a weighted sum of soft losses;
    logits: softmax(sum_k w_k z_k / T), a different estimator."""


@dataclass(frozen=True)
class Shown:
    """One batch, as a loss sees it."""

    logits_BC: Tensor
    """The student's."""
    label_probs_BC: Tensor
    """One-hot, smoothed or mixed; zeros where unlabelled."""
    rows_BR: Tensor | None = None
    """The teachers' logits after the method's reduction; None if there are none."""
    members: Members | None = None
    """The teachers; None if there are none."""
    progress: float = 0.0
    """Share of the training that is done, in [0, 1)."""
    labelled: float = 1.0
    """Share of the training images that have labels, above 0."""
    also: Mapping[str, Tensor] = field(default_factory=dict)
    """Further outputs of the method's learner: peers' logits, features, a gate's parameters."""


class Reduction(Protocol):
    """Reduces the members' logits to all that a loss needs about an image, as one row."""

    def __call__(self, logits_KBC: Tensor, labels_B: Tensor) -> Tensor:
        """Rows (B, R), float32, each from its own image alone; labels are -1 where unlabelled."""
