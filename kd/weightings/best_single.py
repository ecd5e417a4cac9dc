"""The best member alone."""

from pathlib import Path
from typing import Literal

import numpy as np

from kd.component import component
from kd.weightings.found import Found, check_logits, population_history
from kd.weightings.objectives import Measure, objective_on


@component
class BestSingle:
    """Weight 1 for the member that is best on the validation samples."""

    kind: Literal["best_single"] = "best_single"
    objective: Measure = "accuracy"
    """What "best" means: accuracy (ties broken by NLL), nll or brier."""

    def find(
        self,
        logits_KNC: np.ndarray,
        labels_N: np.ndarray,
        names: tuple[str, ...],
        seed: int,
        study_path: Path | None = None,
    ) -> Found:
        """Evaluate every member; the first one wins ties."""
        check_logits(logits_KNC, labels_N, names)
        singles_KK = np.eye(len(names))
        values_K = objective_on(logits_KNC, labels_N, self.objective)(singles_KK)
        best = int(np.argmin(values_K))
        return Found(
            names,
            singles_KK[best],
            float(values_K[best]),
            population_history(singles_KK, values_K, len(names)),
            evaluations=len(names),
        )
