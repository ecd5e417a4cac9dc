"""Differential evolution in plain numpy, one generation at a time.

A search is a pure function of its seed and the values it is given.  Every generation draws from
a counter-based generator keyed (seed, generation), so a generation can be drawn again without
drawing those before it, and a resumed search is bit-identical.

Candidates are points of the unit cube, except in the columns marked as simplex: there the
population *is* the weight vectors, clipped at 0 and renormalised after every mutation.

Sources: Storn & Price 1997 (rand/1, best/1, binomial crossover); Zhang & Sanderson 2009 (JADE:
current-to-pbest/1, archive of defeated parents); Tanabe & Fukunaga 2013 (SHADE: memory of
successful F and CR); Deb 2000 (feasible before infeasible).  docs/weightings.md lists where this
departs from them.

Shapes: P population, D dimensions.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

from kd.weightings.simplex import from_cube, onto_simplex

Strategy = Literal["rand1", "best1", "current-to-best1", "jade", "shade"]
Bounds = Literal["midpoint", "clip", "reflect"]
Init = Literal["lhs", "random"]

ADAPTIVE = ("jade", "shade")
SPREAD = 0.1  # scale of the Cauchy (F) and the normal (CR) that adaptive strategies draw from
JADE_RATE = 0.1  # c of JADE: update rate of its means of successful F and CR


def default_population(dimensions: int) -> int:
    """20 up to 5 dimensions, 40 up to 20, twice the dimensions beyond.

    Measured on ensemble weights: halving the usual 10 to 15 per dimension halves the evaluations.
    """
    if dimensions <= 5:
        return 20
    return 40 if dimensions <= 20 else 2 * dimensions


def counter_rng(*key: int) -> np.random.Generator:
    """The random generator for `key`, e.g. (seed, generation)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def latin_hypercube(rng: np.random.Generator, size: int, dimensions: int) -> np.ndarray:
    """`size` points of the unit cube with one point per stratum of every axis: (P, D)."""
    strata_PD = rng.permuted(np.tile(np.arange(size), (dimensions, 1)), axis=1).T
    return (strata_PD + rng.random((size, dimensions))) / size


@dataclass(frozen=True)
class Rules:
    """How a population evolves; see the arguments of the same names of DESampler."""

    population_size: int
    strategy: Strategy = "shade"
    F: float | tuple[float, ...] = (0.5, 1.0)
    CR: float = 0.9
    p: float = 0.05
    memory_size: int = 6
    archive_rate: float = 1.0
    init: Init = "lhs"
    bounds: Bounds = "midpoint"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the settings."""
        scales = self.F if isinstance(self.F, tuple) else (self.F, self.F)
        wanted = {
            "population_size": (self.population_size >= 4, "at least 4"),
            "strategy": (self.strategy in get_args(Strategy), f"one of {get_args(Strategy)}"),
            "F": (
                len(scales) == 2 and 0 < scales[0] <= scales[1] <= 2,
                "in (0, 2], or a pair (low, high) of such",
            ),
            "CR": (0 <= self.CR <= 1, "in [0, 1]"),
            "p": (0 < self.p <= 1, "in (0, 1]"),
            "memory_size": (self.memory_size >= 1, "at least 1"),
            "archive_rate": (self.archive_rate >= 0, "at least 0"),
            "init": (self.init in get_args(Init), f"one of {get_args(Init)}"),
            "bounds": (self.bounds in get_args(Bounds), f"one of {get_args(Bounds)}"),
            "seed": (self.seed >= 0, "at least 0"),
        }
        for name, (holds, text) in wanted.items():
            if not holds:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {text}")


@dataclass(frozen=True)
class Offspring:
    """The candidates of one generation, one per slot of the population."""

    number: int
    rows_PD: np.ndarray
    F_P: np.ndarray
    """Scale of each slot's mutation; NaN for rows drawn at random, which earn no credit."""
    CR_P: np.ndarray


@dataclass(frozen=True)
class Evaluated:
    """Candidates of one generation, in distinct slots, with their values."""

    slots: np.ndarray
    """The slot that each candidate challenges."""
    rows_PD: np.ndarray
    values_P: np.ndarray
    """Smaller is better."""
    violations_P: np.ndarray
    """By how much each violates its constraints, 0 when feasible."""
    F_P: np.ndarray
    """The mutation scale of each; NaN if it was not bred."""
    CR_P: np.ndarray
    """Its crossover rate."""


@dataclass
class Evolution:
    """A population, and its strategy's memory.

    `propose` draws the next generation, `absorb` takes the values of its candidates.
    """

    rules: Rules
    simplex_D: np.ndarray
    """Which columns are weights that stay on the simplex, bool."""
    nominal_D: np.ndarray
    """Which columns are categories, whose differences have no meaning, bool."""
    visible: Callable[[np.ndarray], np.ndarray] = lambda rows_PD: rows_PD
    """Rows as the objective sees them (steps and categories rounded), to find duplicates."""

    rows_PD: np.ndarray = field(init=False)
    values_P: np.ndarray = field(init=False)
    violations_P: np.ndarray = field(init=False)
    archive_AD: np.ndarray = field(init=False)
    memory_F: np.ndarray = field(init=False)
    memory_CR: np.ndarray = field(init=False)
    next_memory: int = field(default=0, init=False)
    seen: set[bytes] = field(default_factory=set, init=False)
    """The initial rows and every row that was absorbed, as the objective saw them."""

    def __post_init__(self) -> None:
        """Start with empty slots, whose random rows are placeholders without values."""
        rules, size = self.rules, self.rules.population_size
        self.rows_PD = self._drawn(counter_rng(rules.seed, 0), size)
        self.values_P = np.full(size, np.inf)
        self.violations_P = np.full(size, np.inf)
        self.archive_AD = np.empty((0, len(self.simplex_D)))
        memory_size = 1 if rules.strategy == "jade" else rules.memory_size
        self.memory_F = np.full(memory_size, 0.5)
        self.memory_CR = np.full(memory_size, rules.CR)
        self.seen.update(self._keys(self.rows_PD))

    def propose(self, generation: int) -> Offspring:
        """Draw the candidates of `generation`; generation 0 is the initial population."""
        rules, size = self.rules, self.rules.population_size
        rng = counter_rng(rules.seed, generation)
        if generation == 0:
            unbred_P = np.full(size, np.nan)
            return Offspring(0, self._drawn(rng, size), unbred_P, unbred_P)
        F_P, CR_P = self._scales(rng)
        donors_PD = self._mutated(rng, F_P)
        crossed_PD = rng.random(donors_PD.shape) < CR_P[:, None]
        crossed_PD[np.arange(size), rng.integers(donors_PD.shape[1], size=size)] = True
        rows_PD = self._repaired(np.where(crossed_PD, donors_PD, self.rows_PD), donors_PD)
        return self._without_duplicates(rng, Offspring(generation, rows_PD, F_P, CR_P))

    def absorb(self, *groups: Evaluated, generation: int) -> None:
        """Let candidates challenge the occupants of their slots, one group after another.

        The memory learns once from all groups: results that arrive late, when several processes
        search together, must not overwrite it one by one.

        Args:
            groups: the candidates of a generation each.
            generation: keys the random choice of what leaves a full archive.
        """
        won = [self._challenged(group, generation) for group in groups]
        learned = [np.concatenate(each) for each in zip(*won, strict=True)]
        if self.rules.strategy in ADAPTIVE and learned and learned[0].size:
            self._learn(*learned)

    def _challenged(self, group: Evaluated, generation: int) -> tuple[np.ndarray, ...]:
        """Replace the beaten occupants; returns what `_learn` takes, of those that beat them."""
        slots, values_P, violations_P = group.slots, group.values_P, group.violations_P
        self.seen.update(self._keys(group.rows_PD))
        before_P, was_P = self.values_P[slots], self.violations_P[slots]
        # Ties are accepted: on the plateaus of accuracy the population must be able to drift.
        nearer_P = violations_P < was_P
        wins_P = nearer_P | ((violations_P == was_P) & (values_P <= before_P))
        improves_P = wins_P & (nearer_P | (values_P < before_P))
        defeated_P = improves_P & np.isfinite(was_P)
        # inf - inf, for candidates without improvement; or a gain beyond the largest float.
        with np.errstate(invalid="ignore", over="ignore"):
            gains_P = np.where(nearer_P, was_P - violations_P, before_P - values_P)
        self._archive(self.rows_PD[slots[defeated_P]], generation)
        winners = slots[wins_P]
        self.rows_PD[winners] = group.rows_PD[wins_P]
        self.values_P[winners] = values_P[wins_P]
        self.violations_P[winners] = violations_P[wins_P]
        credited_P = defeated_P & ~np.isnan(group.F_P)
        return tuple(each[credited_P] for each in (group.F_P, group.CR_P, gains_P, nearer_P))

    def copied(self) -> "Evolution":
        """An independent copy."""
        twin = copy.copy(self)
        vars(twin).update({name: copy.copy(value) for name, value in vars(self).items()})
        return twin

    def keep_columns(self, kept_D: np.ndarray) -> None:
        """Drop dimensions: `kept_D` is a bool for every current column."""
        self.simplex_D, self.nominal_D = self.simplex_D[kept_D], self.nominal_D[kept_D]
        self.rows_PD, self.archive_AD = self.rows_PD[:, kept_D], self.archive_AD[:, kept_D]
        self.seen.clear()  # its rows have more columns

    def order(self) -> np.ndarray:
        """Slots from best to worst by Deb's rules."""
        return np.lexsort((self.values_P, self.violations_P))

    def _drawn(self, rng: np.random.Generator, size: int) -> np.ndarray:
        dimensions = len(self.simplex_D)
        lhs = self.rules.init == "lhs"
        cube_PD = latin_hypercube(rng, size, dimensions) if lhs else rng.random((size, dimensions))
        if self.simplex_D.any():
            cube_PD[:, self.simplex_D] = from_cube(cube_PD[:, self.simplex_D])
        return cube_PD

    def _scales(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """F and CR of every slot."""
        rules, size = self.rules, self.rules.population_size
        if rules.strategy not in ADAPTIVE:
            low, high = rules.F if isinstance(rules.F, tuple) else (rules.F, rules.F)
            return rng.uniform(low, high, size), np.full(size, rules.CR)
        chosen = rng.integers(len(self.memory_F), size=size)
        CR_P = np.clip(rng.normal(self.memory_CR[chosen], SPREAD), 0.0, 1.0)
        # A Cauchy truncated to F > 0 by inverting its distribution, then clipped at 1: the
        # papers' "draw again while F <= 0" without a loop of unknown length.
        below = 0.5 - np.arctan(self.memory_F[chosen] / SPREAD) / np.pi
        quantile = below + (1 - below) * rng.random(size)
        F_P = self.memory_F[chosen] + SPREAD * np.tan(np.pi * (quantile - 0.5))
        return np.clip(F_P, np.finfo(float).tiny, 1.0), CR_P

    def _mutated(self, rng: np.random.Generator, F_P: np.ndarray) -> np.ndarray:
        """Base + F (attractor - base) + F (plus - minus), the common form of all strategies."""
        strategy, size = self.rules.strategy, self.rules.population_size
        own = np.arange(size)
        ranked = self.order()
        pool_AD = self.rows_PD
        if strategy == "rand1":
            base = attractor = _others(rng, size, own)
            plus = _others(rng, size, own, base)
            minus = _others(rng, size, own, base, plus)
        else:
            plus = _others(rng, size, own)
            if strategy == "best1":
                base = attractor = np.full(size, ranked[0])
            else:
                top = 1 if strategy == "current-to-best1" else max(1, round(self.rules.p * size))
                base, attractor = own, ranked[rng.integers(top, size=size)]
            if strategy in ADAPTIVE:
                pool_AD = np.concatenate([self.rows_PD, self.archive_AD])
            minus = _others(rng, len(pool_AD), own, plus)
        base_PD, attractor_PD = self.rows_PD[base], self.rows_PD[attractor]
        plus_PD, minus_PD = self.rows_PD[plus], pool_AD[minus]
        donors_PD: np.ndarray = base_PD + F_P[:, None] * (
            attractor_PD - base_PD + plus_PD - minus_PD
        )
        if self.nominal_D.any():
            nominal = self.nominal_D
            differs_PD = self.visible(plus_PD) != self.visible(minus_PD)
            donors_PD[:, nominal] = _recategorised(
                rng, F_P, base_PD[:, nominal], attractor_PD[:, nominal], differs_PD[:, nominal]
            )
        return donors_PD

    def _repaired(self, rows_PD: np.ndarray, donors_PD: np.ndarray) -> np.ndarray:
        """Bring candidates back into the cube and onto the simplex."""
        match self.rules.bounds:
            case "clip":
                inside_PD: np.ndarray = np.clip(rows_PD, 0.0, 1.0)
            case "midpoint":  # half-way from the parent to the bound that was crossed
                middle_PD = (np.clip(rows_PD, 0.0, 1.0) + self.rows_PD) / 2
                inside_PD = np.where((rows_PD < 0) | (rows_PD > 1), middle_PD, rows_PD)
            case "reflect":
                inside_PD = 1 - np.abs(1 - np.mod(rows_PD, 2.0))
        if self.simplex_D.any():
            weights_PK = rows_PD[:, self.simplex_D]
            # Crossover may pick only entries <= 0.  The donor sums to 1, so it has positive ones.
            hopeless_P1 = ~(weights_PK > 0).any(axis=1, keepdims=True)
            weights_PK = np.where(hopeless_P1, donors_PD[:, self.simplex_D], weights_PK)
            inside_PD[:, self.simplex_D] = onto_simplex(weights_PK)
        return inside_PD

    def _without_duplicates(self, rng: np.random.Generator, drawn: Offspring) -> Offspring:
        """Replace rows tried before, or drawn for an earlier slot, by new random points."""
        size = len(drawn.rows_PD)
        again_P = np.zeros(size, dtype=bool)
        earlier: set[bytes] = set()
        for slot, key in enumerate(self._keys(drawn.rows_PD)):
            again_P[slot] = key in self.seen or key in earlier
            earlier.add(key)
        if not again_P.any():
            return drawn
        fresh_PD = self._drawn(rng, size)
        rows_PD = np.where(again_P[:, None], fresh_PD, drawn.rows_PD)
        F_P, CR_P = (np.where(again_P, np.nan, scale) for scale in (drawn.F_P, drawn.CR_P))
        return Offspring(drawn.number, rows_PD, F_P, CR_P)

    def _keys(self, rows_PD: np.ndarray) -> list[bytes]:
        """Keys that identify rows; + 0.0 turns -0.0 into 0.0."""
        return [row.tobytes() for row in np.ascontiguousarray(self.visible(rows_PD) + 0.0)]

    def _archive(self, parents_AD: np.ndarray, generation: int) -> None:
        """Archive defeated parents; if the archive is full, random ones are dropped."""
        room = round(self.rules.archive_rate * self.rules.population_size)
        self.archive_AD = np.concatenate([self.archive_AD, parents_AD])
        excess = len(self.archive_AD) - room
        if excess > 0:
            rng = counter_rng(self.rules.seed, generation, 1)
            stays = np.sort(rng.permutation(len(self.archive_AD))[excess:])
            self.archive_AD = self.archive_AD[stays]

    def _learn(
        self, F_S: np.ndarray, CR_S: np.ndarray, gains_S: np.ndarray, nearer_S: np.ndarray
    ) -> None:
        """Update the memory of F and CR from the S candidates that beat their parents.

        Args:
            F_S: their mutation scales.
            CR_S: their crossover rates.
            gains_S: how much each reduced the violation, or else the value.
            nearer_S: which of the two, True for violation.
        """
        if self.rules.strategy == "jade":  # Zhang & Sanderson 2009, eqs. 9 to 12
            self.memory_CR += JADE_RATE * (CR_S.mean() - self.memory_CR)
            self.memory_F += JADE_RATE * (_lehmer(F_S, np.ones_like(F_S)) - self.memory_F)
            return
        # Tanabe & Fukunaga 2013, eqs. 7 to 9; the Lehmer mean for CR too, as in their L-SHADE.
        if nearer_S.any() and not nearer_S.all():
            # The paper has only values; the scale of constraints must not outweigh theirs.
            for kind_S in (nearer_S, ~nearer_S):
                gains_S[kind_S] = _summable(gains_S[kind_S])
                gains_S[kind_S] /= gains_S[kind_S].mean()
        else:
            gains_S = _summable(gains_S)
        self.memory_F[self.next_memory] = _lehmer(F_S, gains_S)
        self.memory_CR[self.next_memory] = _lehmer(CR_S, gains_S)
        self.next_memory = (self.next_memory + 1) % len(self.memory_F)


def has_converged(
    values_P: np.ndarray, violations_P: np.ndarray, relative: float, absolute: float
) -> bool:
    """Scipy's criterion: std of the population's values <= absolute + relative * |mean|.

    False while any member is infeasible, as in scipy: constraints come before values.
    """
    if violations_P.any() or not np.isfinite(values_P).all():
        return False
    return bool(values_P.std() <= absolute + relative * abs(values_P.mean()))


def minimise(
    objective: Callable[[np.ndarray], np.ndarray],
    evolution: Evolution,
    generations: int,
    *,
    absolute: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Evolve until the population has converged, or for `generations`.

    Args:
        objective: rows (P, D) -> values (P,), smaller is better.
        evolution: the population, without values so far.
        generations: maximum number to draw.
        absolute: see `has_converged`.

    Returns:
        Every row tried (M, D) and its value (M,), in order.
    """
    size = evolution.rules.population_size
    slots, feasible = np.arange(size), np.zeros(size)
    tried, values = [], []
    for generation in range(generations):
        drawn = evolution.propose(generation)
        told_P = objective(drawn.rows_PD)
        tried.append(drawn.rows_PD)
        values.append(told_P)
        usable = ~np.isnan(told_P)
        whole = (slots, drawn.rows_PD, told_P, feasible, drawn.F_P, drawn.CR_P)
        evolution.absorb(Evaluated(*(each[usable] for each in whole)), generation=generation + 1)
        if has_converged(evolution.values_P, evolution.violations_P, 0.0, absolute):
            break
    return np.concatenate(tried), np.concatenate(values)


def _others(rng: np.random.Generator, size: int, *taken: np.ndarray) -> np.ndarray:
    """For each slot a uniform index below `size`, different from its taken ones."""
    index = rng.integers(size - len(taken), size=len(taken[0]))
    for used in np.sort(np.stack(taken), axis=0):
        index = index + (index >= used)
    return index


def _recategorised(
    rng: np.random.Generator,
    F_P: np.ndarray,
    base_PD: np.ndarray,
    attractor_PD: np.ndarray,
    differs_PD: np.ndarray,
) -> np.ndarray:
    """Mutation of categories: where two others differ, a new draw with probability F."""
    chance_P1 = F_P[:, None]
    to_attractor = rng.random(base_PD.shape) < chance_P1
    anew = differs_PD & (rng.random(base_PD.shape) < chance_P1)
    drawn = np.where(to_attractor, attractor_PD, base_PD)
    return np.where(anew, rng.random(base_PD.shape), drawn)


def _summable(gains_S: np.ndarray) -> np.ndarray:
    """Gains scaled by a power of two, which is exact, so that no sum of them overflows.

    An infinite one, over an occupant of infinite value, counts as much as the largest other.
    """
    finite = np.isfinite(gains_S)
    largest = gains_S[finite].max(initial=0.0) or 1.0
    scaled_S: np.ndarray = np.ldexp(np.where(finite, gains_S, largest), -np.frexp(largest)[1])
    return scaled_S


def _lehmer(values_S: np.ndarray, shares_S: np.ndarray) -> float:
    """Weighted Lehmer mean sum(s v^2) / sum(s v); 0 where all values are 0."""
    below = float(shares_S @ values_S)
    return float(shares_S @ values_S**2) / below if below > 0 else 0.0
