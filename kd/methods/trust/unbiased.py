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
"""What a cosine may miss by; where all have the biased member's direction, they count alike."""


@component
class Unbiased(ByStudent):
    """1 - cosine of a member's gradient and the biased member's, for each image.

    The paper compares gradients by the student's parameters; here they are by its logits, which
    is this project's own reading and spares a pass through the network for each member.  They are
    those of plain KD's soft loss also under methods of another one: AGRE-KD is `kd` with them.
    """

    kind: Literal["unbiased"] = "unbiased"
    biased: str
    """The member, by its name in params.yaml, whose direction is avoided; it does not teach."""

    alone: ClassVar[bool] = True

    def check(self, members: Members) -> None:
        """Refuse an unknown biased member, and one that is alone or has all the weight.

        Raises:
            ConfigError: nobody would be left to teach, or nobody has that name.
        """
        require(self.biased in members.names, "biased", self.biased, f"one of {members.names}")
        weights = dict(zip(members.names, members.weights_K, strict=True))
        others = any(weight > 0 for name, weight in weights.items() if name != self.biased)
        wanted = f"above 0 for another teacher than the biased {self.biased!r}, who does not teach"
        require(others, "weights", weights, wanted)

    def factors(self, gradients_KBC: Tensor, members: Members) -> Tensor:
        """(B, K) in [0, 2]; 0 for the biased member alone, so that others are always left."""
        away = members.names.index(self.biased)
        factors_KB = 1 - cosine_similarity(gradients_KBC, gradients_KBC[away][None], dim=2)
        factors_KB = factors_KB.clamp(min=ROUNDING)
        factors_KB[away] = 0
        return factors_KB.T
