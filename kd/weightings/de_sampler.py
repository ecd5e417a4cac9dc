"""DESampler: differential evolution behind Optuna's sampler interface.

The search's state is a pure function of (seed, storage).  With NP the population size, trial n is
slot n % NP of generation n // NP; a slot's occupant is its best finished trial; each generation is
drawn at once from a counter-based generator keyed (seed, generation), and generation g depends
only on trials numbered below g NP.  So only trials are stored, a new process rebuilds everything
by replaying them, and sequential, batched and resumed searches are bit-identical.

This is the only module of kd that imports optuna, and it uses private parts of it: `_storage` and
`_study_id`, as Optuna's own samplers do (the public way copies every trial), and `Trial._suggest`.

Shapes: P population, D dimensions of the search space.
"""

import contextlib
import copy
import hashlib
import itertools
import json
import math
import os
import threading
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from kd.weightings.evolution import (
    Bounds,
    Evolution,
    Init,
    Offspring,
    Rules,
    Strategy,
    counter_rng,
    default_population,
    has_converged,
)
from kd.weightings.simplex import onto_simplex

BatchObjective = Callable[[np.ndarray], np.ndarray]
"""Rows (P, D) of parameter values -> P objective values; a category is its index."""

SEED_ATTRIBUTE = "de_sampler:seed"
SUM_TOLERANCE = 1e-6  # largest deviation from 1 of the sum of enqueued weights
REMEMBERED = 3  # generations whose rows are kept, for trials that finish late
UNKNOWN_SPACE_POPULATION = 20

ATTRIBUTES = frozenset({"user_attr", "system_attr", "user_attrs", "system_attrs"})
"""Keys of journal lines that hold objects from users."""

_encode = json.JSONEncoder(separators=(",", ":")).encode


@dataclass(frozen=True)
class Generation:
    """A whole generation, for drivers that evaluate it at once."""

    number: int
    first_trial: int
    """Number of the trial that belongs to row 0; row i belongs to trial `first_trial + i`."""
    distributions: dict[str, BaseDistribution]
    """The search space, in the order of the columns."""
    params: np.ndarray
    """Parameter values (P, D); a category is its index."""
    rows: list[list[Any]]
    """The same in Optuna's form: floats, ints and categories."""
    offspring: Offspring
    """The same in the population's form."""


class DESampler(optuna.samplers.BaseSampler):
    """Differential evolution for single-objective studies.

    Supports float (log, step), int (log, step) and categorical parameters.  Parameters that are
    not in the search space, or not in every trial, are drawn independently, one stratum of a
    Latin hypercube per trial.  Pruned and failed trials leave their slot's occupant in place;
    enqueued and added trials compete for theirs; trial constraints follow Deb's rules.
    Processes that share a storage share one search, without waiting for each other.

    Args:
        search_space: distribution of every parameter.  By default the `simplex` parameters or,
            from the second generation on, the parameters common to all finished trials.
        population_size: "auto" is 20 up to 5 dimensions, 40 up to 20, twice the dimensions
            beyond, and 20 if the search space is not given.
        strategy: "rand1", "best1", "current-to-best1", "jade" (current-to-pbest/1 with archive,
            F and CR follow their successful means) or "shade" (the same with a memory).
        F: scale of mutation; a pair is dithered per candidate.  Adaptive strategies ignore it.
        CR: share of parameters taken from the mutant; the initial one in adaptive strategies.
        p: adaptive strategies draw attractors from this share of the best, at least from one;
            fixed, whereas SHADE's paper draws it per candidate from [2 / population, 0.2].
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
        self._space = None if search_space is None else _Space(search_space, self._simplex)
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
        self._search: _Search | None = None
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
            search = self._read(study)
            self._known(search.latest())
            return search.population()

    def has_converged(self, study: optuna.Study, relative: float, absolute: float) -> bool:
        """Whether the whole population is feasible, and std <= absolute + relative * |mean|.

        Raises:
            ValueError: the search space is not known yet.
        """
        with self._lock:
            search = self._read(study)
            self._known(search.latest())
            return search.has_converged(relative, absolute)

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
        self._search_of(study)
        if self._independent_sampler is not None:
            return self._independent_sampler.sample_independent(
                study, trial, param_name, param_distribution
            )
        number, slot = divmod(trial.number, self.population_size)
        rng = counter_rng(
            self._search_of(study).rules.seed, number, zlib.crc32(param_name.encode())
        )
        size = self.population_size
        unit = (rng.permutation(size)[slot] + rng.random(size)[slot]) / size
        axis = _Axis.of(param_distribution)
        return axis.shown(axis.decoded(np.array([unit])))[0]

    def _known(self, generation: Generation | None) -> Generation:
        if generation is None:
            raise ValueError("the search space is not known: give DESampler a search_space")
        return generation

    def _generation_of(self, study: optuna.Study, trial_number: int) -> Generation | None:
        with self._lock:
            number = trial_number // self.population_size
            return self._search_of(study, number).generation(number)

    def _read(self, study: optuna.Study) -> "_Search":
        num_trials = study._storage.get_n_trials(study._study_id)
        return self._search_of(study, num_trials // self.population_size).as_read(num_trials)

    def _search_of(self, study: optuna.Study, number: int = 0) -> "_Search":
        """The search of this study; for another study than before, a new one, filled by replay.

        Before generation 1, while no trial is absorbed, the stored seed is read again: processes
        that start at the same time each store one, and the last one counts.
        """
        with self._lock:
            storage, study_id = study._storage, study._study_id
            search = self._search
            if (
                search is None
                or search.storage is not storage
                or search.study_id != study_id
                or (number > 0 and search.drawn == 1 and not self._seeded)
            ):
                self._raise_error_if_multi_objective(study)
                rules = replace(self._rules, seed=self._seed(study))
                sign = -1.0 if study.direction == optuna.study.StudyDirection.MAXIMIZE else 1.0
                search = self._search = _Search(
                    storage, study_id, sign, rules, self._space, self._consider_pruned_trials
                )
            return search

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
        """Everything but the lock and the search, which is rebuilt from the storage."""
        return {**self.__dict__, "_lock": None, "_search": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make a new lock; the next trial replays the storage."""
        self.__dict__.update(state, _lock=threading.RLock())


class _Search:
    """One study's population, kept up to date with its storage."""

    def __init__(
        self,
        storage: optuna.storages.BaseStorage,
        study_id: int,
        sign: float,
        rules: Rules,
        space: "_Space | None",
        consider_pruned_trials: bool,
    ) -> None:
        self.storage, self.study_id, self.rules = storage, study_id, rules
        self._sign = sign  # -1 to maximise
        self._space, self._space_is_given = space, space is not None
        self._evolution = space.evolution(rules) if space is not None and len(space) else None
        self._states = {TrialState.COMPLETE}
        if consider_pruned_trials:
            self._states.add(TrialState.PRUNED)
        self._seen = 0  # trials below this number are absorbed, or among the unfinished
        self._unfinished: list[int] = []
        self.drawn = 0  # generations drawn so far, which is the number of the next one
        self._recent: dict[int, Generation] = {}

    def generation(self, number: int) -> Generation | None:
        """Generation `number`; None if it has no search space or is no longer kept."""
        if number >= self.drawn:
            self._advance(number, self.storage.get_all_trials(self.study_id, deepcopy=False))
        return self._recent.get(number)

    def latest(self) -> Generation | None:
        """The generation drawn last; None if it has no search space."""
        return self._recent.get(self.drawn - 1)

    def as_read(self, num_trials: int) -> "_Search":
        """The search after drawing the generation of the study's next trial.

        A copy if trials before that generation are unfinished: drawing it for good would leave
        them out, so that reading would change the search.
        """
        size = self.rules.population_size
        if num_trials // size < self.drawn:
            return self
        trials = self.storage.get_all_trials(self.study_id, deepcopy=False)
        upcoming = len(trials)
        while upcoming > 0 and trials[upcoming - 1].state == TrialState.WAITING:
            upcoming -= 1
        number = upcoming // size
        before = (*self._unfinished, *range(self._seen, number * size))
        search = self if all(trials[n].state.is_finished() for n in before) else self._copied()
        search._advance(number, trials)
        return search

    def population(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows as parameter values, and values with the study's own sign."""
        assert self._space is not None
        assert self._evolution is not None
        values_P = self._sign * self._evolution.values_P
        return self._space.decoded(self._evolution.rows_PD), values_P

    def has_converged(self, relative: float, absolute: float) -> bool:
        """Scipy's criterion, applied to the occupants."""
        assert self._evolution is not None
        occupants = self._evolution
        return has_converged(occupants.values_P, occupants.violations_P, relative, absolute)

    def _copied(self) -> "_Search":
        """An independent copy."""
        twin = copy.copy(self)
        twin._recent = dict(self._recent)
        twin._evolution = None if self._evolution is None else self._evolution.copied()
        return twin

    def _advance(self, number: int, trials: list[FrozenTrial]) -> None:
        while self.drawn <= number:
            self._draw(trials)

    def _draw(self, trials: list[FrozenTrial]) -> None:
        """Absorb the trials that the next generation depends on, and draw it."""
        number, size = self.drawn, self.rules.population_size
        self._absorb(self._finished(trials, number * size))
        self.drawn += 1
        self._recent.pop(number - REMEMBERED, None)
        if self._space is None or self._evolution is None:
            return
        offspring = self._evolution.propose(number)
        params_PD = self._space.decoded(offspring.rows_PD)
        rows = self._space.shown(params_PD)
        self._recent[number] = Generation(
            number, number * size, self._space.distributions, params_PD, rows, offspring
        )

    def _finished(self, trials: list[FrozenTrial], limit: int) -> list[FrozenTrial]:
        """Trials numbered below `limit` that finished since the last call, in order."""
        limit = min(limit, len(trials))
        numbers = [*self._unfinished, *range(self._seen, limit)]
        self._seen = max(self._seen, limit)
        self._unfinished = [n for n in numbers if not trials[n].state.is_finished()]
        finished = (trials[n] for n in numbers)
        return [t for t in finished if t.state in self._states and t.value is not None]

    def _absorb(self, trials: list[FrozenTrial]) -> None:
        if not self._space_is_given:
            self._narrow(trials)
        if self._space is None or self._evolution is None:
            return
        size = self.rules.population_size
        by_generation: dict[int, list[FrozenTrial]] = {}
        for trial in trials:
            by_generation.setdefault(trial.number // size, []).append(trial)
        for number, group in sorted(by_generation.items()):
            self._challenge(number, group, self._space, self._evolution)

    def _challenge(
        self, number: int, trials: list[FrozenTrial], space: "_Space", evolution: Evolution
    ) -> None:
        """Let the finished trials of one generation challenge the occupants of their slots."""
        size = self.rules.population_size
        drawn = self._recent.get(number)
        slots, rows, values, violations, F, CR = [], [], [], [], [], []
        for trial in trials:
            slot = trial.number % size
            shown = space.row_of(trial)
            as_drawn = drawn is not None and drawn.rows[slot] == shown
            if shown is None or not (as_drawn or space.contains(shown)):
                continue
            # A trial that the strategy did not draw (enqueued, added) earns it no credit.
            offspring = drawn.offspring if drawn is not None and as_drawn else None
            slots.append(slot)
            rows.append(space.encoded(shown) if offspring is None else offspring.rows_PD[slot])
            F.append(math.nan if offspring is None else offspring.F_P[slot])
            CR.append(math.nan if offspring is None else offspring.CR_P[slot])
            values.append(self._sign * _value(trial))
            violations.append(_violation(trial))
        if slots:
            evolution.absorb(
                np.array(slots),
                np.array(rows),
                np.array(values),
                np.array(violations),
                np.array(F),
                np.array(CR),
                generation=self.drawn,
            )

    def _narrow(self, trials: list[FrozenTrial]) -> None:
        """Reduce the space to parameters that all finished trials have, with one distribution."""
        for trial in trials:
            theirs = trial.distributions
            if self._space is None:
                self._space = _Space(dict(sorted(theirs.items())), ())
                self._evolution = self._space.evolution(self.rules) if len(self._space) else None
                continue
            ours = self._space.distributions
            kept = [theirs.get(name) == distribution for name, distribution in ours.items()]
            if all(kept):
                continue
            shared = {n: d for (n, d), keep in zip(ours.items(), kept, strict=True) if keep}
            self._space = _Space(shared, ())
            self._recent.clear()  # their rows have other columns
            if self._evolution is not None:
                self._evolution.keep_columns(np.array(kept))
                self._evolution.visible = self._space.decoded
                self._evolution = self._evolution if shared else None


class _Space:
    """The search space as columns of a matrix, without parameters that have only one value."""

    def __init__(self, distributions: dict[str, BaseDistribution], simplex: tuple[str, ...]):
        for name in simplex:
            if distributions.get(name) != FloatDistribution(0.0, 1.0):
                raise ValueError(
                    f"simplex names {name!r}, whose distribution is {distributions.get(name)}; "
                    "it must be FloatDistribution(0.0, 1.0)"
                )
        self.distributions = {n: d for n, d in distributions.items() if not d.single()}
        self._axes = [_Axis.of(distribution) for distribution in self.distributions.values()]
        self._simplex_D = np.array([name in simplex for name in self.distributions], dtype=bool)
        # Storages return another NaN object, and lists compare NaNs equal only if identical.
        self._nans = [
            (column, choice)
            for column, axis in enumerate(self._axes)
            for choice in axis.choices or ()
            if isinstance(choice, float) and math.isnan(choice)
        ]

    def __len__(self) -> int:
        return len(self._axes)

    def evolution(self, rules: Rules) -> Evolution:
        """A population in this space, without values so far."""
        nominal_D = np.array([axis.choices is not None for axis in self._axes], dtype=bool)
        return Evolution(rules, self._simplex_D, nominal_D, self.decoded)

    def decoded(self, rows_PD: np.ndarray) -> np.ndarray:
        """Points of the unit cube -> parameter values."""
        if all(axis.is_unit for axis in self._axes):
            return rows_PD.copy()  # callers may change it
        columns = [axis.decoded(rows_PD[:, d]) for d, axis in enumerate(self._axes)]
        return np.stack(columns, axis=1)

    def shown(self, params_PD: np.ndarray) -> list[list[Any]]:
        """Parameter values -> rows in Optuna's form."""
        columns = [axis.shown(params_PD[:, d]) for d, axis in enumerate(self._axes)]
        return [list(row) for row in zip(*columns, strict=True)]

    def row_of(self, trial: FrozenTrial) -> list[Any] | None:
        """The trial's parameters in the order of the columns; None if it lacks one."""
        params = trial.params
        try:
            row = [params[name] for name in self.distributions]
        except KeyError:
            return None
        for column, nan in self._nans:
            if row[column] != row[column]:
                row[column] = nan
        return row

    def contains(self, row: list[Any]) -> bool:
        """Whether every value of a row is in its parameter's range, and weights sum to 1."""
        if not all(axis.contains(value) for axis, value in zip(self._axes, row, strict=True)):
            return False
        # Projecting the point onto the simplex would assign its value to another point.
        weights = [*itertools.compress(row, self._simplex_D)]
        return not weights or abs(sum(weights) - 1) <= SUM_TOLERANCE

    def encoded(self, row: list[Any]) -> np.ndarray:
        """A row in Optuna's form -> a point of the unit cube."""
        point_D = np.array([axis.encoded(v) for axis, v in zip(self._axes, row, strict=True)])
        if self._simplex_D.any():
            point_D[self._simplex_D] = onto_simplex(point_D[None, self._simplex_D])[0]
        return point_D


@dataclass(frozen=True)
class _Axis:
    """One parameter and its unit interval.

    Grids (steps, integers, categories) give every value an equal share of the interval.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None
    is_float: bool = True
    choices: tuple[Any, ...] | None = None

    @staticmethod
    def of(distribution: BaseDistribution) -> "_Axis":
        """The axis of a distribution."""
        match distribution:
            case FloatDistribution(low=low, high=high, log=log, step=step):
                return _Axis(low, high, log, step)
            case IntDistribution(low=low, high=high, log=log, step=step):
                return _Axis(low, high, log, None if log else step, is_float=False)
            case CategoricalDistribution(choices=choices):
                last = len(choices) - 1
                return _Axis(0, last, step=1, is_float=False, choices=tuple(choices))
        raise ValueError(f"DESampler does not support {type(distribution).__name__}")

    @property
    def is_unit(self) -> bool:
        """Whether parameter values equal points of the unit interval."""
        return (self.low, self.high, self.log, self.step) == (0, 1, False, None)

    def decoded(self, units_P: np.ndarray) -> np.ndarray:
        """Unit interval -> values; categories as their index."""
        if self.step is not None:
            cells = self._cells()
            stepped_P: np.ndarray = np.minimum(np.floor(units_P * cells), cells - 1) * self.step
            return np.minimum(self.low + stepped_P, self.high)
        low, high = self._ends()
        values_P = low * (1 - units_P) + high * units_P
        if self.log:
            values_P = np.exp(values_P)
        if not self.is_float:
            values_P = np.round(values_P)
        return np.clip(values_P, self.low, self.high)

    def encoded(self, shown: Any) -> float:
        """The point of the unit interval for a value; the middle of its share on a grid."""
        value = float(shown if self.choices is None else self.choices.index(shown))
        if self.step is not None:
            return (round((value - self.low) / self.step) + 0.5) / self._cells()
        low, high = self._ends()
        return ((math.log(value) if self.log else value) - low) / (high - low)

    def shown(self, values_P: np.ndarray) -> list[Any]:
        """Values in Optuna's form."""
        if self.choices is not None:
            return [self.choices[int(index)] for index in values_P]
        values: list[float] = values_P.tolist()
        return values if self.is_float else [int(value) for value in values]

    def contains(self, value: Any) -> bool:
        """Whether a trial's value lies on this axis."""
        if self.choices is not None:
            return value in self.choices
        return isinstance(value, int | float) and self.low <= value <= self.high

    def _cells(self) -> int:
        assert self.step is not None
        return round((self.high - self.low) / self.step) + 1

    def _ends(self) -> tuple[float, float]:
        """Both ends on the axis' scale; logarithmic integers get half a unit on each side."""
        if not self.log:
            return self.low, self.high
        margin = 0.0 if self.is_float else 0.5
        return math.log(self.low - margin), math.log(self.high + margin)


def _value(trial: FrozenTrial) -> float:
    assert trial.value is not None
    return trial.value


def _violation(trial: FrozenTrial) -> float:
    """Sum of the positive parts of the trial's constraints: 0 when feasible."""
    if not trial.system_attrs:
        return 0.0
    total = sum(max(0.0, value) for value in trial.constraints.values())
    return total if total == total else math.inf


class PrefetchObjective:
    """Evaluates a whole generation at its first trial, under plain `study.optimize`.

        study.optimize(PrefetchObjective(batch_objective), n_trials=2000)

    Later trials of the generation look up their value.  A trial whose parameters differ from its
    row (it was enqueued) is evaluated on its own.

    Args:
        batch_objective: rows (P, D) of parameter values, a category as its index -> P values.
    """

    def __init__(self, batch_objective: BatchObjective) -> None:
        self._batch_objective = batch_objective
        self._evaluated: tuple[Generation, list[float]] | None = None
        self._lock = threading.Lock()

    def __call__(self, trial: Trial) -> float:
        """The trial's value; NaN, which fails the trial, if the objective returns NaN."""
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
        return float(self._batch_objective(np.array([indices]))[0])

    def _values(self, generation: Generation) -> list[float]:
        with self._lock:
            if self._evaluated is None or self._evaluated[0] is not generation:
                values = np.asarray(self._batch_objective(generation.params), dtype=float)
                self._evaluated = generation, values.tolist()
            return self._evaluated[1]

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the lock and the evaluated generation."""
        return {**self.__dict__, "_lock": None, "_evaluated": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make a new lock."""
        self.__dict__.update(state, _lock=threading.Lock())


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
    for trial, value in zip(trials, batch_objective(np.array(rows)), strict=True):
        if math.isnan(value):
            study.tell(trial, state=TrialState.FAIL)
        else:
            study.tell(trial, float(value))


def _add_trials(study: optuna.Study, batch_objective: BatchObjective, sampler: DESampler) -> None:
    upcoming = study._storage.get_n_trials(study._study_id)
    generation = sampler.generation_of(study, upcoming)
    space, first = generation.distributions, upcoming - generation.first_trial
    values = batch_objective(generation.params[first:])
    for row, value in zip(generation.rows[first:], values, strict=True):
        failed = math.isnan(value)
        study.add_trial(
            optuna.create_trial(
                params=dict(zip(space, row, strict=True)),
                distributions=space,
                state=TrialState.FAIL if failed else TrialState.COMPLETE,
                value=None if failed else float(value),
            )
        )


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


class GenerationJournalBackend(BaseJournalBackend):
    """A journal file written once per generation instead of once per operation.

    The file is a plain Optuna journal: `JournalFileBackend` and optuna-dashboard can read it.
    Trials that a killed process had not written are lost; resuming evaluates them again,
    bit-identically.  fsync runs while the next generation is computed, so a power failure may
    cost two generations.  Only one process may write at a time; a second one is refused.  An
    unfinished trial at the end of the file is dropped when the file is opened again.

        with GenerationJournalBackend("study.log") as backend:
            study = optuna.create_study(storage=optuna.storages.JournalStorage(backend), ...)

    Args:
        path: the journal file; created if it does not exist, else continued.
        trials_per_commit: finished trials that are written together.

    Raises:
        RuntimeError: another process has locked the file.
    """

    def __init__(self, path: str | os.PathLike[str], trials_per_commit: int = 20) -> None:
        if trials_per_commit < 1:
            raise ValueError(f"trials_per_commit is {trials_per_commit}; it must be at least 1")
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            _lock_or_refuse(descriptor, path)
        except RuntimeError:
            os.close(descriptor)
            raise
        _cut_open_trial(descriptor)
        self._reader = JournalFileBackend(os.fspath(path))
        self._trials_per_commit = trials_per_commit
        self._finished = 0
        # Logs from number `_first` on are kept in memory: those of the last commit, which the
        # storage reads back, then those that are pending.
        self._first = sum(1 for _ in self._reader.read_logs(0))
        self._num_committed = 0
        self._recent: list[dict[str, Any]] = []
        self._file = _GroupedFile(descriptor)
        # Runs at close(), or when this is garbage-collected or the interpreter exits.
        self._close = weakref.finalize(self, self._file.close)

    def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
        """Logs from the file, then those not written yet."""
        if log_number_from >= self._first:
            return self._recent[log_number_from - self._first :]
        written = self._reader.read_logs(log_number_from)
        return itertools.chain(written, self._recent[self._num_committed :])

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Queue logs; write them once enough trials have finished."""
        for log in logs:
            line = _encode(log)
            self._file.pending.append(line)
            # Users may change attributes later: keep them as the file will have them.
            self._recent.append(log if ATTRIBUTES.isdisjoint(log) else json.loads(line))
            self._finished += _finishes_trial(log)
        if self._finished >= self._trials_per_commit:
            self.commit()

    def commit(self) -> None:
        """Write what is pending: one write, one fsync.

        Raises:
            OSError: the disk is full, or the previous commit's fsync failed.
        """
        self._file.commit()
        del self._recent[: self._num_committed]
        self._first += self._num_committed
        self._num_committed = len(self._recent)
        self._finished = 0

    def close(self) -> None:
        """Write what is pending and release the file."""
        self._close()

    def __enter__(self) -> "GenerationJournalBackend":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _cut_open_trial(descriptor: int) -> None:
    """Drop an incomplete line or trial that a killed process left at the end.

    Since there is only one writer, no other process can still finish it.
    """
    with open(descriptor, "rb", closefd=False) as file:
        lines = file.readlines()
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    while lines and _leaves_trial_open(json.loads(lines[-1])):
        lines.pop()
    os.ftruncate(descriptor, sum(map(len, lines)))


def _leaves_trial_open(log: dict[str, Any]) -> bool:
    """Whether a journal line starts or updates a trial that is neither finished nor waiting."""
    if log.get("state") == TrialState.WAITING:
        return False
    return ("trial_id" in log or "datetime_start" in log) and not _finishes_trial(log)


def _finishes_trial(log: dict[str, Any]) -> bool:
    """Whether a journal line finishes a trial, or adds a finished one."""
    return log.get("state") is not None and TrialState(log["state"]).is_finished()


class _GroupedFile:
    """Appends lines in groups; fsync of one runs while the next is computed.

    Args:
        descriptor: the file, opened for appending; `close` closes it.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.pending: list[str] = []
        self._disk = ThreadPoolExecutor(1)
        self._synced: Future[None] | None = None

    def commit(self) -> None:
        """Append what is pending; if the disk is full, write nothing, so it can be retried."""
        self._append()
        self._synced = self._disk.submit(os.fsync, self._descriptor)

    def close(self) -> None:
        """Append what is pending, wait for the disk, and close the file."""
        try:
            self._append()
            os.fsync(self._descriptor)  # not in a thread: none can start at interpreter exit
        finally:
            self._disk.shutdown()
            os.close(self._descriptor)

    def _append(self) -> None:
        if self._synced is not None:
            synced, self._synced = self._synced, None
            synced.result()
        size = os.fstat(self._descriptor).st_size
        content = memoryview("".join(f"{line}\n" for line in self.pending).encode())
        try:
            while content:
                content = content[os.write(self._descriptor, content) :]
        except OSError:
            os.ftruncate(self._descriptor, size)
            raise
        self.pending.clear()


def _lock_or_refuse(descriptor: int, path: object) -> None:
    """Lock the file until it is closed or the process dies; without flock, trust the caller."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise RuntimeError(f"{path}: another process is writing this journal") from error


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
