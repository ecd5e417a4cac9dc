"""AE-KD: by gradient, the direction that serves all teachers (Du et al., NeurIPS 2020).

B batch, K members, C classes.
"""

from typing import Literal

from torch import Tensor

from kd.component import component, require
from kd.methods.shown import Members
from kd.methods.trust.base import ByStudent

SWEEPS = 100
"""Pairs of weights that are improved at most; a handful of members needs far fewer."""


@component
class MinNorm(ByStudent):
    """argmin over w of |sum_k w_k g_k|^2 with sum 1 and 0 <= w_k <= cap; one w for a batch.

    g_k is the gradient of plain KD's soft loss under member k by the student's logits, averaged
    over the batch (which is all the paper asks for, so that no pass through the network is
    needed).  A method of another soft loss gets these weights, too: AE-KD is `kd` with them.
    """

    kind: Literal["min_norm"] = "min_norm"
    cap: float = 0.6
    """Largest weight of a member, in (0, 1]; raised to 1 / K where it is less."""

    def __post_init__(self) -> None:
        require(0 < self.cap <= 1, "cap", self.cap, "in (0, 1]")

    def factors(self, gradients_KBC: Tensor, members: Members) -> Tensor:
        """The same weights for every image (B, K); the host waits for the device once."""
        mean_KC = gradients_KBC.mean(dim=1)
        weights_K = min_norm((mean_KC @ mean_KC.T).double().tolist(), self.cap)
        return gradients_KBC.new_tensor(weights_K).expand(gradients_KBC.shape[1], -1)


def min_norm(gram_KK: list[list[float]], cap: float) -> list[float]:
    """The weights whose combination of vectors is shortest, from the vectors' inner products.

    Moves weight between the pair of members where that helps most, as far as helps, until none
    does (sequential minimal optimisation, Platt 1998; the problem is convex).
    """
    members = range(len(gram_KK))
    cap = max(cap, 1 / len(gram_KK))
    weights = [1 / len(gram_KK)] * len(gram_KK)
    scale = max(gram_KK[k][k] for k in members)
    for _ in range(SWEEPS):
        slopes = [sum(w * g for w, g in zip(weights, row, strict=True)) for row in gram_KK]
        up = min((k for k in members if weights[k] < cap), key=slopes.__getitem__, default=0)
        down = max((k for k in members if weights[k] > 0), key=slopes.__getitem__)
        if slopes[down] - slopes[up] <= 1e-12 * scale:
            break
        curvature = gram_KK[up][up] + gram_KK[down][down] - 2 * gram_KK[up][down]
        most = min(cap - weights[up], weights[down])
        step = min((slopes[down] - slopes[up]) / curvature, most) if curvature > 0 else most
        weights[up] += step
        weights[down] -= step
    return weights
