"""The search for ensemble weights, as a study that can be resumed.

Shapes: P population, D parameters, M candidates.
"""

import contextlib
import hashlib
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution

from kd.weightings.de_sampler.batch import BatchObjective, DEConvergedCallback, PrefetchObjective
from kd.weightings.de_sampler.journal import GenerationJournalBackend
from kd.weightings.de_sampler.sampler import DESampler
from kd.weightings.evolution import Rules, counter_rng
from kd.weightings.simplex import onto_simplex


def search_weights(
    objective: BatchObjective,
    columns: tuple[str, ...],
    simplex: tuple[str, ...],
    rules: Rules,
    generations: int,
    tolerance: float,
    study_path: Path | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Minimise `objective` in a study of float parameters in [0, 1].

    Args:
        objective: rows (P, D) -> values (P,).
        columns: the D parameters, in the objective's order.
        simplex: those that stay on the simplex.
        rules: the sampler's rules.
        generations: maximum number of generations, including those already in the study.
        tolerance: stop when the std of the population's values is not above this.
        study_path: journal file of the study; None keeps it in memory.

    Returns:
        Every candidate (M, D) and its value (M,), NaN where it failed.
    """
    space: dict[str, BaseDistribution] = {name: FloatDistribution(0.0, 1.0) for name in columns}
    sampler = DESampler(
        space,
        population_size=rules.population_size,
        strategy=rules.strategy,
        simplex=simplex,
        seed=rules.seed,
    )
    with _quiet(), contextlib.ExitStack() as stack:
        storage = None
        if study_path is not None:
            backend = GenerationJournalBackend(study_path, rules.population_size)
            storage = optuna.storages.JournalStorage(stack.enter_context(backend))
        study = optuna.create_study(
            storage=storage,
            sampler=sampler,
            study_name=_fingerprint(objective, columns, rules),
            load_if_exists=True,
        )
        converged = DEConvergedCallback(0.0, tolerance)
        left = generations * rules.population_size - len(study.get_trials(deepcopy=False))
        if left > 0 and not converged.holds(study):
            study.optimize(PrefetchObjective(objective), n_trials=left, callbacks=[converged])
        trials = study.get_trials(deepcopy=False)
    tried_MD = np.array(
        [[trial.params.get(name, math.nan) for name in columns] for trial in trials]
    )
    values_M = np.array([math.nan if trial.value is None else trial.value for trial in trials])
    return tried_MD, values_M


def _fingerprint(objective: BatchObjective, columns: tuple[str, ...], rules: Rules) -> str:
    """A study name unique to problem and rules, so that no other search is resumed."""
    probe_PD = onto_simplex(counter_rng(0).random((8, len(columns))))
    told = objective(probe_PD).tolist()
    digest = hashlib.sha256(repr((columns, rules, told)).encode()).hexdigest()
    return f"weights-{digest[:12]}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Turn off Optuna's log line per trial, which costs more than the trial."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
