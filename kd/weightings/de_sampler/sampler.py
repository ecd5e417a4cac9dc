"""The sampler itself: what Optuna calls, answered from the study's replay."""

import threading
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import FrozenTrial

from kd.weightings.de_sampler.replay import Generation, Replay
from kd.weightings.de_sampler.space import Axis, Space
from kd.weightings.evolution import (
    Bounds,
    Init,
    Rules,
    Strategy,
    counter_rng,
    default_population,
)

SEED_ATTRIBUTE = "de_sampler:seed"
UNKNOWN_SPACE_POPULATION = 20


class DESampler(optuna.samplers.BaseSampler):
    """Differential evolution for single-objective studies.

    Supports float (log, step), int (log, step) and categorical parameters.  Parameters that are
    not in the search space, or not in every trial, are drawn independently, one stratum of a
    Latin hypercube per trial.  Pruned and failed trials leave their slot's occupant in place;
    enqueued and added trials compete for theirs, unless a value is off its parameter's grid; trial
    constraints follow Deb's rules.  Processes that share a storage share one search, without
    waiting for each other.

    Args:
        search_space: distribution of every parameter.  By default the `simplex` parameters or,
            from the second generation on, the parameters common to all finished trials.
        population_size: "auto" is 20 up to 5 dimensions, 40 up to 20, twice the dimensions
            beyond, and 20 if the search space is not given.
        strategy: "rand1", "best1", "current-to-best1", "jade" (current-to-pbest/1 with archive,
            F and CR follow their successful means) or "shade" (the same with a memory).
        F: scale of mutation; a pair is dithered per candidate.  Adaptive strategies ignore it.
        CR: share of parameters taken from the mutant; the initial one in adaptive strategies.
        p: adaptive strategies draw attractors from this share of the best, at least from one
            (and at the default from just one, in populations below 30).
        memory_size: entries of SHADE's memory.
        archive_rate: size of the archive of defeated parents, as a multiple of the population.
        init: "lhs" or "random" initial population.
        bounds: "midpoint" (half-way from parent to bound), "clip" or "reflect".
        simplex: names of float parameters in [0, 1] that stay non-negative with sum 1: their
            population members are the weight vectors themselves.  Enqueued and added trials whose
            sum is not 1 stay in the study, but do not compete.
        consider_pruned_trials: let pruned trials compete with their last reported value.
        seed: seed of everything random.  None draws one, and stores it with the study.
        independent_sampler: draws the parameters outside the search space instead.

    Raises:
        ValueError: an argument is out of range, a simplex parameter is not a float in [0, 1] or,
            when sampling, the study is multi-objective.
    """

    def __init__(
        self,
        search_space: dict[str, BaseDistribution] | None = None,
        *,
        population_size: int | Literal["auto"] = "auto",
        strategy: Strategy = "shade",
        F: float | Sequence[float] = (0.5, 1.0),
        CR: float = 0.9,
        p: float = 0.05,
        memory_size: int = 6,
        archive_rate: float = 1.0,
        init: Init = "lhs",
        bounds: Bounds = "midpoint",
        simplex: Sequence[str] | None = None,
        consider_pruned_trials: bool = False,
        seed: int | None = None,
        independent_sampler: optuna.samplers.BaseSampler | None = None,
    ) -> None:
        self._simplex = tuple(simplex or ())
        F = tuple(F) if isinstance(F, Sequence) else F
        if search_space is None and self._simplex:
            search_space = {name: FloatDistribution(0.0, 1.0) for name in self._simplex}
        self._space = None if search_space is None else Space(search_space, self._simplex)
        if population_size == "auto":
            population_size = UNKNOWN_SPACE_POPULATION
            if self._space is not None:
                population_size = default_population(len(self._space))
        self._rules = Rules(
            population_size, strategy, F, CR, p, memory_size, archive_rate, init, bounds, seed or 0
        )
        self._seeded = seed is not None
        self._consider_pruned_trials = consider_pruned_trials
        self._independent_sampler = independent_sampler
        self._replay: Replay | None = None
        self._lock = threading.RLock()

    @property
    def population_size(self) -> int:
        """Trials per generation."""
        return self._rules.population_size

    def generation(self, study: optuna.Study) -> Generation:
        """The generation that the study's next trial belongs to.

        If earlier trials are unfinished, it is drawn without them, and may change.

        Raises:
            ValueError: the search space is not known yet.
        """
        with self._lock:
            return self._known(self._read(study).latest())

    def generation_of(self, study: optuna.Study, trial_number: int) -> Generation:
        """The generation that a running trial belongs to.

        Raises:
            ValueError: the search space is not known, or the trial is several generations old.
        """
        return self._known(self._generation_of(study, trial_number))

    def population(self, study: optuna.Study) -> tuple[np.ndarray, np.ndarray]:
        """The best row of every slot (P, D), and its value (P,); not finite in an empty slot.

        Trials of the current generation are not in it yet.

        Raises:
            ValueError: the search space is not known yet.
        """
        with self._lock:
            replay = self._read(study)
            self._known(replay.latest())
            return replay.population()

    def has_converged(self, study: optuna.Study, relative: float, absolute: float) -> bool:
        """Whether the whole population is feasible, and std <= absolute + relative * |mean|.

        Raises:
            ValueError: the search space is not known yet.
        """
        with self._lock:
            replay = self._read(study)
            self._known(replay.latest())
            return replay.has_converged(relative, absolute)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """The search space of the trial's generation; empty while it is unknown."""
        generation = self._generation_of(study, trial.number)
        # A copy: PartialFixedSampler deletes from it.
        return {} if generation is None else dict(generation.distributions)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The trial's row; parameters that the row lacks are drawn independently."""
        generation = self._generation_of(study, trial.number)
        row: dict[str, Any] = {}
        if generation is not None:
            slot = trial.number - generation.first_trial
            row = {
                name: value
                for (name, known), value in zip(
                    generation.distributions.items(), generation.rows[slot], strict=True
                )
                if (wanted := search_space.get(name)) is known or wanted == known
            }
        for name in search_space.keys() - row.keys():
            row[name] = self.sample_independent(study, trial, name, search_space[name])
        return row

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """One parameter on its own: stratum `slot` of a Latin hypercube over the generation."""
        if self._independent_sampler is not None:
            return self._independent_sampler.sample_independent(
                study, trial, param_name, param_distribution
            )
        number, slot = divmod(trial.number, self.population_size)
        rng = counter_rng(
            self._replay_of(study).rules.seed, number, zlib.crc32(param_name.encode())
        )
        size = self.population_size
        unit = (rng.permutation(size)[slot] + rng.random(size)[slot]) / size
        axis = Axis.of(param_distribution)
        return axis.shown(axis.decoded(np.array([unit])))[0]

    def reseed_rng(self) -> None:
        """Reseed the independent sampler; what is drawn here depends on seed and storage only."""
        if self._independent_sampler is not None:
            self._independent_sampler.reseed_rng()

    def _known(self, generation: Generation | None) -> Generation:
        if generation is None:
            raise ValueError(
                "the search space is not known, or nothing in it can vary: give DESampler a "
                "search_space"
            )
        return generation

    def _generation_of(self, study: optuna.Study, trial_number: int) -> Generation | None:
        with self._lock:
            number = trial_number // self.population_size
            return self._replay_of(study, number).generation(number)

    def _read(self, study: optuna.Study) -> Replay:
        num_trials = study._storage.get_n_trials(study._study_id)
        return self._replay_of(study, num_trials // self.population_size).as_read(num_trials)

    def _replay_of(self, study: optuna.Study, number: int = 0) -> Replay:
        """This study's replay; for another study than before, a new one.

        Before generation 1, while no trial is absorbed, the stored seed is read again: processes
        that start at the same time each store one, and the last one counts.
        """
        with self._lock:
            storage, study_id = study._storage, study._study_id
            replay = self._replay
            if (
                replay is None
                or replay.storage is not storage
                or replay.study_id != study_id
                or (number > 0 and replay.drawn == 1 and not self._seeded)
            ):
                self._raise_error_if_multi_objective(study)
                rules = replace(self._rules, seed=self._seed(study))
                sign = -1.0 if study.direction == optuna.study.StudyDirection.MAXIMIZE else 1.0
                replay = self._replay = Replay(
                    storage, study_id, sign, rules, self._space, self._consider_pruned_trials
                )
            return replay

    def _seed(self, study: optuna.Study) -> int:
        """The given seed, or the one stored with the study, which resuming needs."""
        if self._seeded:
            return self._rules.seed
        storage = study._storage
        attributes = storage.get_study_system_attrs(study._study_id)
        if SEED_ATTRIBUTE not in attributes:
            drawn = int(np.random.SeedSequence().generate_state(1)[0])
            storage.set_study_system_attr(study._study_id, SEED_ATTRIBUTE, drawn)
            attributes = storage.get_study_system_attrs(study._study_id)
        return int(attributes[SEED_ATTRIBUTE])

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the lock and the replay, which is rebuilt from the storage."""
        return {**self.__dict__, "_lock": None, "_replay": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make a new lock; the next trial replays the storage."""
        self.__dict__.update(state, _lock=threading.RLock())
