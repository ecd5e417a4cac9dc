"""AGRE-KD: away from a model known to be biased (Kenfack et al., TMLR 2025, arXiv 2411.14984).

B batch, K members, C classes.
"""

from typing import ClassVar, Literal

from torch import Tensor
from torch.nn.functional import cosine_similarity

from kd.component import component, require
from kd.methods.shown import Members
from kd.methods.trust.base import ByStudent

ROUNDING = 1e-6
"""Smallest factor of the other members, so that all count equally if all agree with the biased."""


@component
class Unbiased(ByStudent):
    """1 - cosine between a member's gradient and the biased member's, for each image.

    The paper takes gradients by the student's parameters; here they are by its logits, which is
    our interpretation and saves a backward pass per member.  They are those of plain KD's
    soft loss even if the method has another one; AGRE-KD is `kd` with this trust.
    """

    kind: Literal["unbiased"] = "unbiased"
    biased: str
    """Name in params.yaml of the member whose direction is avoided; it does not teach."""

    alone: ClassVar[bool] = True

    def check(self, members: Members) -> None:
        """Refuse an unknown biased member, and one that has all the weight.

        Raises:
            ConfigError: no member has that name, or none would be left to teach.
        """
        require(self.biased in members.names, "biased", self.biased, f"one of {members.names}")
        weights = dict(zip(members.names, members.weights_K, strict=True))
        others = any(weight > 0 for name, weight in weights.items() if name != self.biased)
        wanted = f"above 0 for a teacher other than the biased {self.biased!r}, who does not teach"
        require(others, "weights", weights, wanted)

    def factors(self, gradients_KBC: Tensor, members: Members) -> Tensor:
        """(B, K) in [0, 2]; 0 only for the biased member, so that others are always left."""
        away = members.names.index(self.biased)
        factors_KB = 1 - cosine_similarity(gradients_KBC, gradients_KBC[away][None], dim=2)
        factors_KB = factors_KB.clamp(min=ROUNDING)
        factors_KB[away] = 0
        return factors_KB.T
