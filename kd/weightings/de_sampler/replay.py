"""A study's population, rebuilt from its trials alone.

Shapes: P population, D dimensions of the search space.
"""

import copy
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from kd.weightings.de_sampler.space import Space
from kd.weightings.evolution import Evaluated, Offspring, Rules, has_converged

REMEMBERED = 3  # generations whose rows are kept, for trials that finish late


@dataclass(frozen=True, eq=False)  # a key of dictionaries, by identity
class Generation:
    """A whole generation, for drivers that evaluate it at once."""

    number: int
    first_trial: int
    """Number of the trial that belongs to row 0; row i belongs to trial `first_trial + i`."""
    distributions: dict[str, BaseDistribution]
    """The search space, in the order of the columns."""
    params: np.ndarray
    """Parameter values, one column per distribution; a category is its index."""
    rows: list[list[Any]]
    """The same in Optuna's form: floats, ints and categories."""
    offspring: Offspring
    """The same in the population's form."""


class Replay:
    """One study's population, kept up to date with its storage."""

    def __init__(
        self,
        storage: BaseStorage,
        study_id: int,
        sign: float,
        rules: Rules,
        space: Space | None,
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

    def as_read(self, num_trials: int) -> "Replay":
        """The replay after drawing the generation of the study's next trial.

        A copy if trials before that generation are unfinished: drawing it for good would leave
        them out, so that reading would change it.
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
        replay = self if all(trials[n].state.is_finished() for n in before) else self._copied()
        replay._advance(number, trials)
        return replay

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

    def _copied(self) -> "Replay":
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
        params_PA = self._space.decoded(offspring.rows_PD)
        rows = self._space.shown(params_PA)
        self._recent[number] = Generation(
            number, number * size, dict(self._space.distributions), params_PA, rows, offspring
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
        groups = [
            self._evaluated(number, group, self._space)
            for number, group in itertools.groupby(trials, lambda trial: trial.number // size)
        ]
        self._evolution.absorb(*groups, generation=self.drawn)

    def _evaluated(self, number: int, trials: Iterable[FrozenTrial], space: Space) -> Evaluated:
        """The finished trials of one generation that may challenge the occupants of their slots.

        A trial that this process did not draw so earns the strategy no credit: it was enqueued or
        added, or another process drew it, knowing other trials.
        """
        size = self.rules.population_size
        drawn = self._recent.get(number)
        slots, rows, values, violations, F, CR = [], [], [], [], [], []
        for trial in trials:
            slot = trial.number % size
            shown = space.row_of(trial)
            offspring = None
            if drawn is not None and drawn.rows[slot] == shown:
                offspring = drawn.offspring
            if shown is None or (offspring is None and not space.contains(shown)):
                continue
            slots.append(slot)
            rows.append(space.encoded(shown) if offspring is None else offspring.rows_PD[slot])
            F.append(math.nan if offspring is None else offspring.F_P[slot])
            CR.append(math.nan if offspring is None else offspring.CR_P[slot])
            values.append(self._sign * _value(trial))
            violations.append(_violation(trial))
        return Evaluated(
            np.array(slots, dtype=np.int64),
            np.array(rows).reshape(len(slots), len(space)),
            np.array(values),
            np.array(violations),
            np.array(F),
            np.array(CR),
        )

    def _narrow(self, trials: list[FrozenTrial]) -> None:
        """Reduce the space to parameters that all finished trials have, with one distribution."""
        for trial in trials:
            theirs = trial.distributions
            if self._space is None:
                self._space = Space(dict(sorted(theirs.items())), ())
                self._evolution = self._space.evolution(self.rules) if len(self._space) else None
                continue
            ours = self._space.distributions
            kept = [theirs.get(name) == distribution for name, distribution in ours.items()]
            if all(kept):
                continue
            shared = {n: d for (n, d), keep in zip(ours.items(), kept, strict=True) if keep}
            searched_A = self._space.searched_A
            self._space = Space(shared, ())
            if self._evolution is not None:
                self._evolution.keep_columns(np.array(kept)[searched_A])
                self._evolution.visible = self._space.visible
                self._evolution = self._evolution if len(self._space) else None


def _value(trial: FrozenTrial) -> float:
    assert trial.value is not None
    return trial.value


def _violation(trial: FrozenTrial) -> float:
    """Sum of the positive parts of the trial's constraints: 0 when feasible."""
    if not trial.system_attrs:
        return 0.0
    total = sum(max(0.0, value) for value in trial.constraints.values())
    return total if total == total else math.inf
