"""Stochastic DGKD: a few of the teachers sit out each step (Son et al., ICCV 2021).

B batch, K members, C classes.
"""

from typing import Literal

import torch
from torch import Tensor

from kd.component import component, require
from kd.methods.shown import Members
from kd.methods.trust.base import ByStudent


@component
class Drop(ByStudent):
    """Each teacher stays for a batch with probability `keep`; never none of them.

    Those who stay share the whole weight: the paper's sum of losses grows weaker instead.
    """

    kind: Literal["drop"] = "drop"
    keep: float = 0.75
    """Probability of staying, in (0, 1]."""

    def __post_init__(self) -> None:
        require(0 < self.keep <= 1, "keep", self.keep, "in (0, 1]")

    def factors(self, gradients_KBC: Tensor, members: Members) -> Tensor:
        """1 for who stays, 0 for who sits out, alike for every image (B, K).

        Drawn on the CPU from PyTorch's generator, which the training loop seeds.
        """
        stays_K = torch.rand(len(members.weights_K)) < self.keep
        counts = bool((torch.tensor(members.weights_K) * stays_K).sum() > 0)
        kept_K = stays_K if counts else torch.ones_like(stays_K)
        # A copy of so few bytes is under way at once: nobody waits for it.
        on_device_K = kept_K.to(gradients_KBC, non_blocking=True)
        return on_device_K.expand(gradients_KBC.shape[1], -1)
