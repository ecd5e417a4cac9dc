"""Deep mutual learning (Zhang et al., CVPR 2018, arXiv 1706.00384).

M networks (the student first), B batch, C classes.
"""

from typing import Literal

import torch
from torch import Tensor

from kd.component import component, require
from kd.methods.peers import Together, hard_losses, pulled
from kd.methods.shown import Shown


@component
class DML(Together):
    """Each: hard loss + weight * mean over the others of KL(other || own) (equation 7).

    The paper updates the networks in turn; here all of them are updated at once, each by its own
    loss alone, since the others' logits are detached.
    """

    kind: Literal["dml"] = "dml"
    temperature: float = 1.0
    """Divides the logits before the softmax, above 0."""
    weight: float = 1.0
    """Weight of the divergence from the others (the hard loss has 1), at least 0."""

    def __post_init__(self) -> None:
        require(self.temperature > 0, "temperature", self.temperature, "above 0")
        require(self.weight >= 0, "weight", self.weight, "at least 0")

    def loss(self, shown: Shown) -> Tensor:
        """The sum of all networks' losses."""
        logits_MBC = shown.also["logits_MBC"]
        pairs = [
            pulled(own_BC, other_BC, self.temperature)
            for k, own_BC in enumerate(logits_MBC)
            for other, other_BC in enumerate(logits_MBC)
            if other != k
        ]
        divergence = torch.stack(pairs).sum() / (len(logits_MBC) - 1)
        return hard_losses(logits_MBC, shown) + self.weight * divergence
