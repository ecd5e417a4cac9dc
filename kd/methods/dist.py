"""DIST: relations instead of values (Huang et al., NeurIPS 2022, arXiv 2205.10536).

B batch, C classes.
"""

from typing import Literal

from torch import Tensor
from torch.linalg import vector_norm

from kd.component import component, require
from kd.methods.losses import log_probs, rescaled, wide
from kd.methods.shown import Shown
from kd.methods.taught import SoftMethod

EPSILON = 1e-8
"""Keeps correlations defined: rows or columns that hardly vary count as equal."""


@component
class DIST(SoftMethod):
    """T^2 (inter (1 - correlation over classes) + intra (1 - correlation over images)).

    The paper's weight of 1 for the hard loss corresponds to alpha 0.5 and scale 2.  T^2 is from
    its CIFAR experiments; at its ImageNet temperature of 1 it makes no difference.
    """

    kind: Literal["dist"] = "dist"
    alpha: float = 0.5
    scale: float = 2.0
    inter: float = 2.0
    """The paper's beta: weight of the correlation over classes, per image; at least 0."""
    intra: float = 2.0
    """The paper's gamma: weight of the correlation over images, per class; at least 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.inter >= 0, "inter", self.inter, "at least 0")
        require(self.intra >= 0, "intra", self.intra, "at least 0")

    def soft(
        self, logits_BC: Tensor, soft_log_probs_BC: Tensor, temperature: float, shown: Shown
    ) -> Tensor:
        """One minus the correlations, weighted (B,); the one over images is the same for all."""
        ours_BC = log_probs(logits_BC, temperature).exp()
        theirs_BC = wide(soft_log_probs_BC).exp()
        inter_B = 1 - correlation(ours_BC, theirs_BC, over=1)
        intra_C = 1 - correlation(ours_BC, theirs_BC, over=0)
        return rescaled(self.inter * inter_B + self.intra * intra_C.mean(), temperature)


def correlation(a_BC: Tensor, b_BC: Tensor, over: int) -> Tensor:
    """Pearson's correlation of two tables along dimension `over`."""
    a_BC = a_BC - a_BC.mean(dim=over, keepdim=True)
    b_BC = b_BC - b_BC.mean(dim=over, keepdim=True)
    lengths: Tensor = vector_norm(a_BC, dim=over) * vector_norm(b_BC, dim=over)
    return ((a_BC * b_BC).sum(dim=over) + EPSILON) / (lengths + EPSILON)
