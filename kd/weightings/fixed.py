"""Weights given by hand."""

import math
from pathlib import Path
from typing import Literal

import numpy as np

from kd.component import ConfigError, component, require
from kd.weightings.found import Found, check_logits, one_step
from kd.weightings.objectives import objective_on


@component
class Fixed:
    """Weights that are already known, from a paper or an earlier run."""

    kind: Literal["fixed"] = "fixed"
    weights: dict[str, float]
    """Weight of each member by name, non-negative; normalised to sum to 1."""

    def __post_init__(self) -> None:
        """Refuse negative or non-finite weights, and all zeros."""
        values = self.weights.values()
        fits = all(math.isfinite(w) and w >= 0 for w in values) and sum(values) > 0
        require(fits, "weights", self.weights, "finite, none negative, not all 0")

    def find(
        self,
        logits_KNC: np.ndarray,
        labels_N: np.ndarray,
        names: tuple[str, ...],
        seed: int,
        study_path: Path | None = None,
    ) -> Found:
        """The given weights in the order of `names`, which must be the same members."""
        check_logits(logits_KNC, labels_N, names)
        if set(self.weights) != set(names):
            raise ConfigError(
                f"weights name {sorted(self.weights)}; the members are {sorted(names)}"
            )
        weights_K = np.array([self.weights[name] for name in names])
        weights_K = weights_K / weights_K.sum()
        value = float(objective_on(logits_KNC, labels_N)(weights_K[None])[0])
        return Found(names, weights_K, value, one_step(weights_K, value), evaluations=1)
