"""AE-KD: weights whose combined gradient serves all teachers (Du et al., NeurIPS 2020).

B batch, K members, C classes.
"""

from typing import Literal

import torch
from torch import Tensor

from kd.component import component, require
from kd.methods.shown import Members
from kd.methods.trust.base import ByStudent

ROUNDS = 100
"""Iteration limit, in case rounding prevents convergence; a handful of members needs 2 or 3."""
NEGLIGIBLE = 1e-12
"""Stop if no two slopes differ by more than this, relative to the longest vector's square."""
RIDGE = 1e-13
"""Added to the diagonal, likewise relative: dependent vectors have no unique optimum."""


@component
class MinNorm(ByStudent):
    """argmin over w of |sum_k w_k g_k|^2 with sum 1 and 0 <= w_k <= cap; one w for a batch.

    g_k is the gradient of plain KD's soft loss under member k by the student's logits, averaged
    over the batch; as in the paper, no backward pass through the network is needed.  Methods
    with another soft loss get the same weights; AE-KD is `kd` with this trust.
    """

    kind: Literal["min_norm"] = "min_norm"
    cap: float = 0.6
    """Largest weight of a member, in (0, 1]; raised to 1 / K if it is less."""

    def __post_init__(self) -> None:
        require(0 < self.cap <= 1, "cap", self.cap, "in (0, 1]")

    def factors(self, gradients_KBC: Tensor, members: Members) -> Tensor:
        """The same weights for every image (B, K); the host waits for the device once."""
        mean_KC = gradients_KBC.mean(dim=1).cpu().double()
        weights_K = min_norm(mean_KC @ mean_KC.T, self.cap)
        on_device_K = weights_K.to(gradients_KBC, non_blocking=True)  # few bytes: no waiting
        return on_device_K.expand(gradients_KBC.shape[1], -1)


def min_norm(gram_KK: Tensor, cap: float) -> Tensor:
    """The weights that minimise the norm of the combined vector, from the inner products.

    Alternates between optimising the pair of members whose exchange of weight gains most, as in
    sequential minimal optimisation (Platt, 1998), and all members not at a bound.  Stops when no
    pair gains; since the problem is convex, that is the optimum.

    Args:
        gram_KK: In float64, on the CPU.
        cap: Largest weight, raised to 1 / K if it is less.
    """
    members = len(gram_KK)
    cap = max(cap, 1 / members)
    weights_K = gram_KK.new_full((members,), 1 / members)
    scaled_KK = gram_KK / gram_KK.diagonal().max().clamp(min=torch.finfo(gram_KK.dtype).tiny)
    for _ in range(ROUNDS):
        slopes_K = scaled_KK @ weights_K
        least, taker = slopes_K.masked_fill(weights_K == cap, torch.inf).min(dim=0)
        most, giver = slopes_K.masked_fill(weights_K == 0, -torch.inf).max(dim=0)
        if most - least <= NEGLIGIBLE:
            break
        weights_K = improved(weights_K, torch.stack([taker, giver]), scaled_KK, cap)
        free = ((weights_K > 0) & (weights_K < cap)).nonzero()[:, 0]
        if len(free) > 2:
            weights_K = improved(weights_K, free, scaled_KK, cap)
    return weights_K


def improved(weights_K: Tensor, some: Tensor, gram_KK: Tensor, cap: float) -> Tensor:
    """Move the weights of `some` members towards their optimum, as far as the bounds allow."""
    size = len(some)
    system = gram_KK.new_ones(size + 1, size + 1)  # last row and column: the sum is constant
    system[:size, :size] = gram_KK[some][:, some]
    system.diagonal().add_(RIDGE)[size] = 0
    slopes = gram_KK[some] @ weights_K
    steps_K = torch.zeros_like(weights_K)
    steps_K[some] = torch.linalg.solve(system, torch.cat([-slopes, slopes.new_zeros(1)]))[:size]
    ends_K = cap * (steps_K > 0).to(weights_K)
    rooms_K = ((ends_K - weights_K) / steps_K).masked_fill(steps_K == 0, torch.inf)
    room, first = rooms_K.min(dim=0)
    moved_K = (weights_K + room.clamp(max=1) * steps_K).clamp(0, cap)
    if room <= 1:
        moved_K[first] = ends_K[first]  # exactly at its bound, despite rounding
    return moved_K
