"""Optuna's distributions as the unit cube that differential evolution searches.

Shapes: P points, D dimensions of the search space.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial

from kd.weightings.evolution import Evolution, Rules
from kd.weightings.simplex import onto_simplex

SUM_TOLERANCE = 1e-6  # largest deviation from 1 of the sum of enqueued weights
GRID_TOLERANCE = 1e-8  # largest deviation from a grid, in steps: Optuna's own


class Space:
    """The search space as columns of a matrix; those with only one value are not searched.

    Shapes: A all parameters, D those that are searched.
    """

    def __init__(self, distributions: dict[str, BaseDistribution], simplex: tuple[str, ...]):
        for name in simplex:
            if distributions.get(name) != FloatDistribution(0.0, 1.0):
                raise ValueError(
                    f"simplex names {name!r}, whose distribution is {distributions.get(name)}; "
                    "it must be FloatDistribution(0.0, 1.0)"
                )
        self.distributions = distributions
        self._axes = [Axis.of(distribution) for distribution in distributions.values()]
        self.searched_A = np.array([not d.single() for d in distributions.values()], dtype=bool)
        self._constants = {
            name: axis.shown(np.array([axis.low]))[0]
            for name, axis in zip(distributions, self._axes, strict=True)
            if distributions[name].single()
        }
        self._searched_axes = [*itertools.compress(self._axes, self.searched_A)]
        simplex_A = np.array([name in simplex for name in distributions], dtype=bool)
        self._simplex_D = simplex_A[self.searched_A]
        # Storages return another NaN object, and lists compare NaNs equal only if identical.
        self._nans = [
            (column, choice)
            for column, axis in enumerate(self._axes)
            for choice in axis.choices or ()
            if isinstance(choice, float) and math.isnan(choice)
        ]

    def __len__(self) -> int:
        """D."""
        return len(self._searched_axes)

    def evolution(self, rules: Rules) -> Evolution:
        """A population in this space, without values so far."""
        nominal_D = np.array(
            [each.choices is not None for each in self._searched_axes], dtype=bool
        )
        return Evolution(rules, self._simplex_D, nominal_D, self.visible)

    def visible(self, rows_PD: np.ndarray) -> np.ndarray:
        """Points of the unit cube -> values of the searched parameters (P, D)."""
        if all(axis.is_unit for axis in self._searched_axes):
            return rows_PD.copy()  # callers may change it
        columns = [axis.decoded(rows_PD[:, d]) for d, axis in enumerate(self._searched_axes)]
        return np.stack(columns, axis=1)

    def decoded(self, rows_PD: np.ndarray) -> np.ndarray:
        """Points of the unit cube -> values of all parameters (P, A)."""
        params_PA = np.tile([float(axis.low) for axis in self._axes], (len(rows_PD), 1))
        params_PA[:, self.searched_A] = self.visible(rows_PD)
        return params_PA

    def shown(self, params_PA: np.ndarray) -> list[list[Any]]:
        """Parameter values -> rows in Optuna's form."""
        columns = [axis.shown(params_PA[:, a]) for a, axis in enumerate(self._axes)]
        return [list(row) for row in zip(*columns, strict=True)]

    def row_of(self, trial: FrozenTrial) -> list[Any] | None:
        """The trial's parameters in the order of the columns; None if it lacks a searched one."""
        params = {**self._constants, **trial.params}
        try:
            row = [params[name] for name in self.distributions]
        except KeyError:
            return None
        for column, nan in self._nans:
            if row[column] != row[column]:
                row[column] = nan
        return row

    def contains(self, row: list[Any]) -> bool:
        """Whether every value of a row is one its parameter can take, and weights sum to 1.

        Rounding to a grid, or onto the simplex, would assign the row's value to another point.
        """
        if not all(axis.contains(value) for axis, value in zip(self._axes, row, strict=True)):
            return False
        weights = [*itertools.compress(itertools.compress(row, self.searched_A), self._simplex_D)]
        return not weights or abs(sum(weights) - 1) <= SUM_TOLERANCE

    def encoded(self, row: list[Any]) -> np.ndarray:
        """A row in Optuna's form -> a point of the unit cube."""
        searched = itertools.compress(row, self.searched_A)
        point_D = np.array(
            [axis.encoded(v) for axis, v in zip(self._searched_axes, searched, strict=True)]
        )
        if self._simplex_D.any():
            point_D[self._simplex_D] = onto_simplex(point_D[None, self._simplex_D])[0]
        return point_D


@dataclass(frozen=True)
class Axis:
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
    def of(distribution: BaseDistribution) -> "Axis":
        """The axis of a distribution."""
        match distribution:
            case FloatDistribution(low=low, high=high, log=log, step=step):
                return Axis(low, high, log, step)
            case IntDistribution(low=low, high=high, log=log, step=step):
                return Axis(low, high, log, None if log else step, is_float=False)
            case CategoricalDistribution(choices=choices):
                last = len(choices) - 1
                return Axis(0, last, step=1, is_float=False, choices=tuple(choices))
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
        if not isinstance(value, int | float) or not self.low <= value <= self.high:
            return False
        if self.step is None:
            return self.is_float or value == round(value)
        cell = (value - self.low) / self.step
        return abs(cell - round(cell)) < GRID_TOLERANCE

    def _cells(self) -> int:
        assert self.step is not None
        return round((self.high - self.low) / self.step) + 1

    def _ends(self) -> tuple[float, float]:
        """Both ends on the axis' scale; logarithmic integers get half a unit on each side."""
        if not self.log:
            return self.low, self.high
        margin = 0.0 if self.is_float else 0.5
        return math.log(self.low - margin), math.log(self.high + margin)
