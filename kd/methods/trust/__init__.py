"""How much each teacher is trusted for an image, in addition to its ensemble weight.

By image: from the teachers' logits and the label, so it is computed once and cached.  By student:
from the gradients that the teachers would give, computed at every step.  One file each, and one
word here: the union is the registry.
"""

from collections.abc import Mapping
from typing import Any, get_args

from kd.component import ConfigError, require
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
    "trust_of",
]


def trust_of(plain: Mapping[str, Any]) -> Trust:
    """The trust that plain settings describe, as those of the user's own methods do.

    Raises:
        ConfigError: its kind or a key is unknown, or a value is out of range.
    """
    kinds = {each.kind: each for each in get_args(Trust)}
    kind = plain.get("kind")
    require(kind in kinds, "trust.kind", kind, f"one of {', '.join(kinds)}")
    try:
        made: Trust = kinds[kind](**plain)
    except TypeError as error:
        raise ConfigError(f"trust: {error}") from error
    return made
