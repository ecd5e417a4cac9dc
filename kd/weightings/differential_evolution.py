"""Weights by differential evolution: any objective, smooth or not.

Shapes: K members, N samples, C classes, M candidates, D = K, or K + 1 with a temperature.
"""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from kd.component import component, require
from kd.weightings.accuracy_guard import held_out_contest
from kd.weightings.evolution import (
    Evolution,
    Rules,
    Strategy,
    default_population,
    minimise,
)
from kd.weightings.expectation_maximization import ExpectationMaximization
from kd.weightings.found import (
    Found,
    check_logits,
    few_samples_warning,
    nothing_to_search,
    population_history,
    uniform_found,
)
from kd.weightings.objectives import (
    Measure,
    Mixing,
    MixtureNLL,
    Objective,
    mixed_log_probs,
    objective_on,
    sample_scores,
    temperature_of,
)
from kd.weightings.shrinkage import shrinkage_by_cross_validation
from kd.weightings.simplex import toward_uniform

TEMPERATURE = "(temperature)"  # a column after the members', who cannot have this name
GENERATIONS_PER_MEMBER = 50


@component
class DifferentialEvolution:
    """Search the simplex with SHADE through an Optuna study, then shrink towards uniform.

    Validation accuracy of searched weights is optimistic by up to several points, so the default
    objective is NLL, and cross-validation corrects the weights.
    """

    kind: Literal["differential_evolution"] = "differential_evolution"
    objective: Measure = "nll"
    """What is minimised on the validation samples; accuracy means errors, ties by NLL."""
    mixing: Mixing = "probabilities"
    """Whether the ensemble averages probabilities or logits."""
    fit_temperature: bool = False
    """Search one temperature, in [1/8, 8], together with the weights."""
    strategy: Strategy = "shade"
    """How candidates are generated; shade adapts its own parameters."""
    population: int | None = None
    """Candidates per generation; by default 20 up to 5 members, 40 up to 20, twice the members
    beyond; a fitted temperature counts as a member."""
    generations: int | None = None
    """Maximum number of generations; 50 per member if not given."""
    tolerance: float = 1e-9
    """Stop when the standard deviation of the population's values is not above this."""
    shrink: bool = True
    """Guard against overfitting by 5-fold cross-validation: move the weights towards uniform by
    the share that it chooses; for accuracy, average the folds' weights, but use those of the
    least NLL unless the average is better by more than one standard error."""
    study: bool = True
    """Search through an Optuna study; false gives bit-identical results without one."""

    def __post_init__(self) -> None:
        """Check the settings."""
        size, generations = self.population, self.generations
        require(size is None or size >= 4, "population", size, "at least 4")
        require(generations is None or generations >= 1, "generations", generations, "at least 1")
        require(self.tolerance >= 0, "tolerance", self.tolerance, "at least 0")

    def find(
        self,
        logits_KNC: np.ndarray,
        labels_N: np.ndarray,
        names: tuple[str, ...],
        seed: int,
        study_path: Path | None = None,
    ) -> Found:
        """Search, then correct the result by cross-validation.

        Args:
            logits_KNC: every member's validation logits.
            labels_N: true classes.
            names: the members, in order.
            seed: of the search and of the folds.
            study_path: journal file of the study, for optuna-dashboard; an interrupted search
                of the same problem is resumed from it.

        Raises:
            ConfigError: invalid input (see `check_logits`), or with `shrink` under 5 samples.
        """
        check_logits(logits_KNC, labels_N, names)
        objective = self._objective(logits_KNC, labels_N)
        if nothing_to_search(logits_KNC) and not self.fit_temperature:
            return uniform_found(names, objective)
        members = len(names)
        tried_MD, values_M = self._search(objective, names, seed, study_path)
        best_D = tried_MD[np.nanargmin(values_M)]
        point_D, share, doubts = self._guarded(best_D, logits_KNC, labels_N, seed)
        history = population_history(tried_MD[:, :members], values_M, self._size(members))
        return Found(
            names,
            point_D[:members],
            float(objective(point_D[None])[0]),
            history,
            evaluations=len(values_M),
            gap=self._gap(objective, best_D),
            searched_K=best_D[:members],
            shrinkage=share,
            temperature=temperature_of(point_D[-1]) if self.fit_temperature else None,
            warnings=few_samples_warning(len(labels_N), members) + doubts,
        )

    def _objective(self, logits_KNC: np.ndarray, labels_N: np.ndarray) -> Objective:
        return objective_on(
            logits_KNC, labels_N, self.objective, self.mixing, temperature=self.fit_temperature
        )

    def _size(self, members: int) -> int:
        return self.population or default_population(members + self.fit_temperature)

    def _rules(self, members: int, seed: int) -> Rules:
        return Rules(self._size(members), self.strategy, seed=seed)

    def _generations(self, members: int) -> int:
        return self.generations or GENERATIONS_PER_MEMBER * members

    def _search(
        self, objective: Objective, names: tuple[str, ...], seed: int, study_path: Path | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Every candidate (M, D), and its value (M,)."""
        if self.study:
            return self._search_in_study(objective, names, seed, study_path)
        return self._search_in_numpy(objective, len(names), seed)

    def _search_in_numpy(
        self, objective: Objective, members: int, seed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        simplex_D = np.array([True] * members + [False] * self.fit_temperature)
        evolution = Evolution(self._rules(members, seed), simplex_D, np.zeros_like(simplex_D))
        return minimise(objective, evolution, self._generations(members), absolute=self.tolerance)

    def _search_in_study(
        self, objective: Objective, names: tuple[str, ...], seed: int, study_path: Path | None
    ) -> tuple[np.ndarray, np.ndarray]:
        from kd.weightings import de_sampler  # imports optuna, which takes over a second

        rules = self._rules(len(names), seed)
        columns = (*names, TEMPERATURE) if self.fit_temperature else names
        return de_sampler.search_weights(
            objective,
            columns,
            names,
            rules,
            self._generations(len(names)),
            self.tolerance,
            study_path,
        )

    def _guarded(
        self, best_D: np.ndarray, logits_KNC: np.ndarray, labels_N: np.ndarray, seed: int
    ) -> tuple[np.ndarray, float | None, tuple[str, ...]]:
        """The candidate after cross-validation, the share of uniform, and warnings."""
        if not self.shrink:
            return best_D, None, ()
        if self.objective != "accuracy":
            share = self._share(logits_KNC, labels_N, seed)
            return _shrunk(best_D, share, len(logits_KNC)), share, ()
        return self._accuracy_guarded(logits_KNC, labels_N, seed)

    def _accuracy_guarded(
        self, logits_KNC: np.ndarray, labels_N: np.ndarray, seed: int
    ) -> tuple[np.ndarray, float | None, tuple[str, ...]]:
        """The folds' average if it wins on held-out samples, else the weights of least NLL."""
        nll = replace(self, objective="nll")
        share = nll._share(logits_KNC, labels_N, seed)

        def fit(samples: np.ndarray) -> np.ndarray:
            return self._fit(logits_KNC[:, samples], labels_N[samples], seed)

        def nll_fit(samples: np.ndarray) -> np.ndarray:
            found_D = nll._fit(logits_KNC[:, samples], labels_N[samples], seed)
            return _shrunk(found_D, share, len(logits_KNC))

        def is_right(point_D: np.ndarray, samples: np.ndarray) -> np.ndarray:
            temperature = temperature_of(point_D[-1]) if self.fit_temperature else 1.0
            ensemble = point_D[: len(logits_KNC)], logits_KNC[:, samples], self.mixing
            logs_NC = mixed_log_probs(*ensemble, temperature)
            return sample_scores(logs_NC, labels_N[samples])[1]

        contest = held_out_contest(fit, nll_fit, is_right, labels_N, seed)
        if contest.is_won:
            return contest.mean_D, None, ()
        doubt = (
            f"held out, weights searched for accuracy gain {contest.gain:+.4f} +- "
            f"{contest.error:.4f} over those of the least NLL, which is not more than one "
            "standard error: using the latter"
        )
        return nll_fit(np.arange(len(labels_N))), share, (doubt,)

    def _share(self, logits_KNC: np.ndarray, labels_N: np.ndarray, seed: int) -> float:
        """How far cross-validation moves the weights towards uniform."""

        def fit(samples: np.ndarray) -> np.ndarray:
            return self._fit(logits_KNC[:, samples], labels_N[samples], seed)

        def on(samples: np.ndarray) -> Objective:
            return self._objective(logits_KNC[:, samples], labels_N[samples])

        return shrinkage_by_cross_validation(fit, on, labels_N, len(logits_KNC), seed)

    def _fit(self, logits_KNC: np.ndarray, labels_N: np.ndarray, seed: int) -> np.ndarray:
        """The best candidate (D,), without study or guard."""
        if self._is_convex_nll():  # EM finds the same optimum in a millisecond
            nll = MixtureNLL(logits_KNC, labels_N)
            return ExpectationMaximization().minimum(nll)[0]
        objective = self._objective(logits_KNC, labels_N)
        tried_MD, values_M = self._search_in_numpy(objective, len(logits_KNC), seed)
        best_D: np.ndarray = tried_MD[np.nanargmin(values_M)]
        return best_D

    def _is_convex_nll(self) -> bool:
        """Whether the objective is the one that EM solves."""
        fixed = not self.fit_temperature
        return self.objective == "nll" and self.mixing == "probabilities" and fixed

    def _gap(self, objective: Objective, best_D: np.ndarray) -> float | None:
        """Bound on how far the search ended above the optimum, certified by EM."""
        if not (self._is_convex_nll() and isinstance(objective, MixtureNLL)):
            return None
        optimum_K, gap, _ = ExpectationMaximization().minimum(objective)
        value, least = objective(np.stack([best_D, optimum_K]))
        return max(0.0, float(value - least)) + gap


def _shrunk(point_D: np.ndarray, share: float, members: int) -> np.ndarray:
    """The candidate with its weights moved towards uniform, its temperature unchanged."""
    weights_K = toward_uniform(point_D[:members], share)
    return np.concatenate([weights_K, point_D[members:]])
