"""Stochastic DGKD: some of the teachers are dropped at each step (Son et al., ICCV 2021).

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
    """Each teacher is kept for a batch with probability `keep`; if none would be, all are.

    The kept ones share the whole weight, whereas the paper's sum of losses shrinks.
    """

    kind: Literal["drop"] = "drop"
    keep: float = 0.75
    """Probability of keeping a teacher, in (0, 1]."""

    def __post_init__(self) -> None:
        require(0 < self.keep <= 1, "keep", self.keep, "in (0, 1]")

    def factors(self, gradients_KBC: Tensor, members: Members) -> Tensor:
        """1 for kept and 0 for dropped members, the same for every image (B, K).

        Drawn on the CPU from PyTorch's generator, which the training loop seeds.
        """
        stays_K = torch.rand(len(members.weights_K)) < self.keep
        counts = bool((torch.tensor(members.weights_K) * stays_K).sum() > 0)
        kept_K = stays_K if counts else torch.ones_like(stays_K)
        # Copying so few bytes does not make the host wait.
        on_device_K = kept_K.to(gradients_KBC, non_blocking=True)
        return on_device_K.expand(gradients_KBC.shape[1], -1)
