"""What a loss is shown: tensors, never models.

B batch, K members, C classes, R entries of a row.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

Mixing = Literal["probabilities", "logits"]


@dataclass(frozen=True)
class Members:
    """What a method may know of its teachers: who they are and how much each counts."""

    names: tuple[str, ...]
    weights_K: tuple[float, ...]
    """At least 0 each, summing to 1."""
    mixing: Mixing = "probabilities"
    """probabilities: sum_k w_k softmax(z_k / T), which is what a weighted sum of losses gives;
    logits: softmax(sum_k w_k z_k / T), another estimator with another name."""


@dataclass(frozen=True)
class Shown:
    """One batch, as a loss sees it."""

    logits_BC: Tensor
    """The student's."""
    label_probs_BC: Tensor
    """One-hot, smoothed or mixed; zeros where unlabelled."""
    rows_BR: Tensor | None = None
    """What the method's reduction kept of its teachers' logits; None where it has none."""
    members: Members | None = None
    """Its teachers; None where it has none."""
    progress: float = 0.0
    """Share of the training that is done, in [0, 1)."""
    labelled: float = 1.0
    """Share of the training's images that have labels, above 0."""
    also: Mapping[str, Tensor] = field(default_factory=dict)
    """What else the method's learner said: peers' logits, features, parameters of a gate."""


class Reduction(Protocol):
    """What is kept of the members' logits: all that a loss will need of an image, as one row."""

    def __call__(self, logits_KBC: Tensor, labels_B: Tensor) -> Tensor:
        """Rows (B, R), float32, each made from its own image alone; -1 labels the unknown."""
