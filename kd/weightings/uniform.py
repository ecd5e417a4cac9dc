"""Every member counts the same."""

from pathlib import Path
from typing import Literal

import numpy as np

from kd.component import component
from kd.weightings.found import Found, check_logits, uniform_found
from kd.weightings.objectives import objective_on


@component
class Uniform:
    """Weights 1/K: the baseline that every other weighting must beat."""

    kind: Literal["uniform"] = "uniform"

    def find(
        self,
        logits_KNC: np.ndarray,
        labels_N: np.ndarray,
        names: tuple[str, ...],
        seed: int,
        study_path: Path | None = None,
    ) -> Found:
        """1/K for each of `names`; logits and labels serve only for the reported NLL."""
        check_logits(logits_KNC, labels_N, names)
        return uniform_found(names, objective_on(logits_KNC, labels_N))
