"""Ensemble selection: repeatedly add the member that helps most."""

from pathlib import Path
from typing import Literal

import numpy as np

from kd.component import component, require
from kd.weightings.found import (
    Found,
    check_logits,
    few_samples_warning,
    nothing_to_search,
    population_history,
    uniform_found,
)
from kd.weightings.objectives import Measure, Mixing, objective_on


@component
class Greedy:
    """Selection with replacement; a member's weight is how often it was chosen.

    Caruana, Niculescu-Mizil, Crew & Ksikes 2004, "Ensemble selection from libraries of models",
    sections 2 and 2.1.
    """

    kind: Literal["greedy"] = "greedy"
    objective: Measure = "nll"
    """What each step improves."""
    mixing: Mixing = "probabilities"
    """Whether the ensemble averages probabilities or logits."""
    steps: int = 100
    """Number of selections; the weights are multiples of 1/n, n <= steps."""

    def __post_init__(self) -> None:
        """Refuse an empty ensemble."""
        require(self.steps >= 1, "steps", self.steps, "at least 1")

    def find(
        self,
        logits_KNC: np.ndarray,
        labels_N: np.ndarray,
        names: tuple[str, ...],
        seed: int,
        study_path: Path | None = None,
    ) -> Found:
        """Select `steps` times; the best ensemble of all steps wins, the earliest on ties."""
        check_logits(logits_KNC, labels_N, names)
        objective = objective_on(logits_KNC, labels_N, self.objective, self.mixing)
        if nothing_to_search(logits_KNC):
            return uniform_found(names, objective)
        members = len(names)
        counts_K = np.zeros(members)
        tried, values = [], []
        for step in range(1, self.steps + 1):
            candidates_KK = (counts_K + np.eye(members)) / step
            values_K = objective(candidates_KK)
            counts_K[int(np.argmin(values_K))] += 1
            tried.append(candidates_KK)
            values.append(values_K)
        history = population_history(np.concatenate(tried), np.concatenate(values), members)
        best = int(np.argmin(history.values_M))
        return Found(
            names,
            history.tried_MK[best],
            float(history.values_M[best]),
            history,
            evaluations=len(history.values_M),
            warnings=few_samples_warning(len(labels_N), members),
        )
