"""Whole generations evaluated at once, and the end of a search that has converged.

Shapes: P population, A parameters.
"""

import math
import threading
from collections.abc import Callable
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from kd.weightings.de_sampler.replay import Generation
from kd.weightings.de_sampler.sampler import DESampler

BatchObjective = Callable[[np.ndarray], np.ndarray]
"""Rows (P, A) of parameter values, one column per parameter of the search space, a category as
its index -> values (P,)."""


class PrefetchObjective:
    """Evaluates a whole generation at its first trial, under plain `study.optimize`.

        study.optimize(PrefetchObjective(batch_objective), n_trials=2000)

    Later trials of the generation look up their value.  A trial whose parameters differ from its
    row (it was enqueued) is evaluated on its own.  Threads share the values; processes do not:
    each evaluates every generation that it has a trial of.

    Args:
        batch_objective: rows (P, A) of parameter values, in the order of the search space, a
            category as its index -> values (P,).
    """

    def __init__(self, batch_objective: BatchObjective) -> None:
        self._batch_objective = batch_objective
        # As long as a generation lives: a thread may fall behind the others by several.
        self._evaluated: WeakKeyDictionary[Generation, list[float]] = WeakKeyDictionary()
        self._lock = threading.Lock()

    def __call__(self, trial: Trial) -> float:
        """The trial's value; NaN, which fails the trial, if the objective returns NaN.

        Raises:
            ValueError: the objective does not return one value per row.
        """
        sampler = _de_sampler(trial.study)
        generation = sampler._generation_of(trial.study, trial.number)
        # A trial that is several generations old has no row, but it has parameters.
        space = (generation or sampler.generation(trial.study)).distributions
        # Like Study.ask; suggest_float etc. would make and check each distribution again.
        row = [trial._suggest(name, d) for name, d in space.items()]
        slot = trial.number % sampler.population_size
        if generation is not None and row == generation.rows[slot]:
            return self._values(generation)[slot]
        indices = [
            float(d.to_internal_repr(value)) for d, value in zip(space.values(), row, strict=True)
        ]
        return _values_of(self._batch_objective, np.array([indices]))[0]

    def _values(self, generation: Generation) -> list[float]:
        with self._lock:
            if generation not in self._evaluated:
                values = _values_of(self._batch_objective, generation.params)
                self._evaluated[generation] = values
            return self._evaluated[generation]

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the lock and the evaluated generations."""
        return {**self.__dict__, "_lock": None, "_evaluated": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make a new lock; generations are evaluated again."""
        self.__dict__.update(state, _lock=threading.Lock(), _evaluated=WeakKeyDictionary())


def optimize_population(
    study: optuna.Study,
    batch_objective: BatchObjective,
    n_generations: int,
    persist: Literal["trials", "add_trials"] = "add_trials",
) -> None:
    """Evaluate whole generations at once, and store every candidate as a trial.

    An unfinished generation (a resumed study, waiting trials) is finished first, and counts.

    Args:
        study: a study whose sampler is a DESampler with a known search space.
        batch_objective: as for `PrefetchObjective`; NaN fails the trial.
        n_generations: how many to finish.
        persist: "add_trials" writes each finished trial once, K + 2 times less than "trials",
            which asks and tells, and so runs enqueued trials, and the storage's heartbeats and
            callbacks.  "add_trials" must be the study's only writer.
    """
    persisted = _ask_and_tell if persist == "trials" else _add_trials
    for _ in range(n_generations):
        persisted(study, batch_objective, _de_sampler(study))


def _ask_and_tell(
    study: optuna.Study, batch_objective: BatchObjective, sampler: DESampler
) -> None:
    space, size = sampler.generation(study).distributions, sampler.population_size
    trials = [study.ask(space)]
    # Waiting trials are asked for first, so this trial belongs to the current generation.
    first = trials[0].number // size * size
    fellows = study.get_trials(deepcopy=False)[first : first + size]
    started = sum(fellow.state != TrialState.WAITING for fellow in fellows)
    trials += [study.ask(space) for _ in range(size - started)]
    rows = [
        [float(d.to_internal_repr(params[name])) for name, d in space.items()]
        for params in (trial.params for trial in trials)
    ]
    try:
        values = _values_of(batch_objective, np.array(rows))
    except BaseException:  # they would run for ever
        for trial in trials:
            study.tell(trial, state=TrialState.FAIL)
        raise
    for trial, value in zip(trials, values, strict=True):
        if math.isnan(value):
            study.tell(trial, state=TrialState.FAIL)
        else:
            study.tell(trial, value)


def _add_trials(study: optuna.Study, batch_objective: BatchObjective, sampler: DESampler) -> None:
    upcoming = study._storage.get_n_trials(study._study_id)
    generation = sampler.generation_of(study, upcoming)
    space, first = generation.distributions, upcoming - generation.first_trial
    values = _values_of(batch_objective, generation.params[first:])
    for row, value in zip(generation.rows[first:], values, strict=True):
        failed = math.isnan(value)
        study.add_trial(
            optuna.create_trial(
                params=dict(zip(space, row, strict=True)),
                distributions=space,
                state=TrialState.FAIL if failed else TrialState.COMPLETE,
                value=None if failed else value,
            )
        )


def _values_of(batch_objective: BatchObjective, rows_PA: np.ndarray) -> list[float]:
    """The rows' values.

    Raises:
        ValueError: the objective does not return one value per row.
    """
    values = np.asarray(batch_objective(rows_PA), dtype=float)
    if values.shape != (len(rows_PA),):
        raise ValueError(
            f"the batch objective returned values of shape {values.shape} for {len(rows_PA)} "
            f"rows; it must return ({len(rows_PA)},)"
        )
    found: list[float] = values.tolist()
    return found


def _de_sampler(study: optuna.Study) -> DESampler:
    if not isinstance(study.sampler, DESampler):
        raise ValueError(f"the study's sampler is {study.sampler}; it must be a DESampler")
    return study.sampler


class DEConvergedCallback:
    """Stops `study.optimize` when the population's values have converged.

    Scipy's criterion, checked when a generation ends: std <= atol + tol * |mean|, and the whole
    population is feasible.

    Args:
        tol: relative tolerance.
        atol: absolute tolerance.
    """

    def __init__(self, tol: float = 0.01, atol: float = 0.0) -> None:
        if tol < 0 or atol < 0:
            raise ValueError(f"tol is {tol} and atol {atol}; neither may be negative")
        self.tol, self.atol = tol, atol

    def __call__(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Stop the study if `trial` ends a generation and the population has converged."""
        if (trial.number + 1) % _de_sampler(study).population_size == 0 and self.holds(study):
            study.stop()

    def holds(self, study: optuna.Study) -> bool:
        """Whether the population has converged."""
        return _de_sampler(study).has_converged(study, self.tol, self.atol)
