"""How much each teacher is trusted for an image, in addition to its ensemble weight.

By image: from the teachers' logits and the label, so it is computed once and cached.  By student:
from the gradients that the teachers would give, computed at every step.  One file each, and one
word here: the union is the registry.
"""

from kd.methods.trust.base import ByImage, ByStudent
from kd.methods.trust.confidence import Confidence
from kd.methods.trust.correctness import Correctness
from kd.methods.trust.drop import Drop
from kd.methods.trust.entropy import Entropy
from kd.methods.trust.min_norm import MinNorm
from kd.methods.trust.unbiased import Unbiased

Trust = Correctness | Confidence | Entropy | MinNorm | Unbiased | Drop

__all__ = [
    "ByImage",
    "ByStudent",
    "Confidence",
    "Correctness",
    "Drop",
    "Entropy",
    "MinNorm",
    "Trust",
    "Unbiased",
]
