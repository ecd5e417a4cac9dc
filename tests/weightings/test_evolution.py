import dataclasses
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd.weightings.evolution import (
    Bounds,
    Evaluated,
    Evolution,
    Offspring,
    Rules,
    Strategy,
    has_converged,
    latin_hypercube,
    minimise,
)

SLOTS = np.arange(10)
NONE = np.zeros(10)


def evolution(simplex: int, cube: int = 0, size: int = 10, **rules) -> Evolution:
    """A population with `simplex` weights and `cube` other columns."""
    simplex_D = np.array([True] * simplex + [False] * cube)
    return Evolution(Rules(size, **rules), simplex_D, np.zeros(simplex + cube, dtype=bool))


def told(search: Evolution, drawn, values, violations=NONE) -> None:
    values = np.asarray(values)
    search.absorb(evaluated(drawn, values, violations), generation=drawn.number + 1)


def evaluated(drawn, values, violations=NONE, slots=SLOTS) -> Evaluated:
    whole = (drawn.rows_PD, np.asarray(values), violations, drawn.F_P, drawn.CR_P)
    return Evaluated(slots, *(each[slots] for each in whole))


@settings(max_examples=60, deadline=None)
@given(
    strategy=st.sampled_from(get_args(Strategy)),
    bounds=st.sampled_from(get_args(Bounds)),
    simplex=st.integers(0, 6),
    cube=st.integers(0, 4),
    seed=st.integers(0, 2**32),
    scale=st.floats(0.01, 2),
)
def test_every_candidate_is_on_the_simplex_and_in_the_cube(
    strategy, bounds, simplex, cube, seed, scale
):
    if simplex + cube == 0:
        return
    search = evolution(simplex, cube, strategy=strategy, bounds=bounds, seed=seed, F=scale)
    values = np.random.default_rng(seed)
    for generation in range(6):
        drawn = search.propose(generation)
        assert ((drawn.rows_PD >= 0) & (drawn.rows_PD <= 1)).all()
        if simplex:
            np.testing.assert_allclose(drawn.rows_PD[:, :simplex].sum(axis=1), 1, atol=1e-12)
        told(search, drawn, values.random(10))


def test_a_generation_can_be_drawn_twice_and_depends_on_the_seed():
    search = evolution(4, seed=1)
    told(search, search.propose(0), SLOTS)
    np.testing.assert_array_equal(search.propose(1).rows_PD, search.propose(1).rows_PD)
    assert (search.propose(1).rows_PD != search.propose(2).rows_PD).any()
    assert (evolution(4, seed=2).propose(0).rows_PD != evolution(4, seed=1).rows_PD).any()


def test_rand1_and_best1_breed_what_the_papers_say():
    """With CR = 1 every candidate is base + F (plus - minus) of three different occupants."""
    for strategy in ("rand1", "best1"):
        search = evolution(0, 3, strategy=strategy, F=0.7, CR=1.0, bounds="reflect")
        rows = search.rows_PD = 0.5 + 0.1 * (search.rows_PD - 0.5)  # so that no bound is crossed
        search.values_P = SLOTS[::-1].astype(float)
        search.violations_P = NONE.copy()
        bases = range(10) if strategy == "rand1" else [9]
        for slot, row in enumerate(search.propose(1).rows_PD):
            sources = [
                (b, p, m)
                for b in bases
                for p in range(10)
                for m in range(10)
                if np.allclose(rows[b] + 0.7 * (rows[p] - rows[m]), row, atol=1e-12)
            ]
            assert len(sources) == 1
            base, plus, minus = sources[0]
            assert slot not in (plus, minus)
            assert plus != minus
            if strategy == "rand1":
                assert len({slot, base, plus, minus}) == 4


@pytest.mark.parametrize(("strategy", "top"), [("current-to-best1", 1), ("jade", 3), ("shade", 3)])
def test_other_strategies_move_from_their_own_place_towards_one_of_the_best(strategy, top):
    """With CR = 1: own + F (one of the best - own) + F (plus - minus)."""
    rules = {"strategy": strategy, "F": 0.7, "CR": 1.0, "p": 0.3, "bounds": "reflect"}
    search = evolution(0, 3, **rules)
    rows = search.rows_PD = 0.5 + 0.1 * (search.rows_PD - 0.5)  # so that no bound is crossed
    search.values_P, search.violations_P = SLOTS[::-1].astype(float), NONE.copy()
    search._scales = lambda rng: (np.full(10, 0.7), np.ones(10))
    towards = set()
    for generation in range(1, 9):
        for slot, row in enumerate(search.propose(generation).rows_PD):
            sources = [
                (best, plus, minus)
                for best in range(10)
                for plus in range(10)
                for minus in range(10)
                if np.allclose(
                    rows[slot] + 0.7 * (rows[best] - rows[slot] + rows[plus] - rows[minus]),
                    row,
                    atol=1e-12,
                )
                and len({slot, plus, minus}) == 3
            ]
            assert len(sources) >= 1
            towards.update(best for best, *_ in sources if len(sources) == 1)
    assert towards == set(range(10 - top, 10))


def test_rates_of_crossover_that_are_all_0_are_remembered_as_0():
    search = evolution(0, 3)
    told(search, search.propose(0), NONE)
    drawn = search.propose(1)
    told(search, dataclasses.replace(drawn, CR_P=NONE), NONE - 1)
    assert search.memory_CR[0] == 0


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("population_size", 4, None),
        ("F", 0.01, 2.0),
        ("CR", 0.0, 1.0),
        ("p", 0.01, 1.0),
        ("memory_size", 1, None),
        ("archive_rate", 0.0, None),
        ("seed", 0, None),
    ],
)
def test_rules_are_taken_up_to_their_bounds_and_refused_beyond_them(name, least, most):
    step = 0.01 if isinstance(least, float) else 1
    edges = [least] if most is None else [least, most]
    beyond = [least - step] if most is None else [least - step, most + step]
    for value in edges:
        assert getattr(Rules(**{"population_size": 10, name: value}), name) == value
    for value in beyond:
        with pytest.raises(ValueError, match=f"{name} is"):
            Rules(**{"population_size": 10, name: value})


def test_equal_values_replace_but_earn_no_credit_and_fill_no_archive():
    search = evolution(0, 3)
    told(search, search.propose(0), NONE)
    before = search.memory_F.copy()
    drawn = search.propose(1)
    told(search, drawn, NONE)
    np.testing.assert_array_equal(search.rows_PD, drawn.rows_PD)
    np.testing.assert_array_equal(search.memory_F, before)
    assert len(search.archive_AD) == 0


def test_the_units_of_constraints_do_not_matter_to_what_shade_learns():
    """Slots below 5 come nearer to feasible, the others to the least value."""

    def learned(unit: float, value: float) -> np.ndarray:
        search = evolution(0, 3)
        violations = unit * (SLOTS < 5)
        told(search, search.propose(0), value * (1 + SLOTS), violations)
        told(search, search.propose(1), NONE, violations * (0.9 - SLOTS / 10))
        return np.array([search.memory_F, search.memory_CR])

    np.testing.assert_allclose(learned(1000, 1), learned(1, 1), rtol=1e-12)
    np.testing.assert_allclose(learned(1, 1000), learned(1, 1), rtol=1e-12)
    assert (learned(0, 1) != learned(1, 1)).any()


def test_the_archive_keeps_defeated_parents_and_never_outgrows_its_room():
    search = evolution(0, 3)
    told(search, search.propose(0), NONE)
    parents = search.rows_PD.copy()
    for generation in range(1, 5):
        told(search, search.propose(generation), NONE - generation)
        if generation == 1:
            np.testing.assert_array_equal(search.archive_AD, parents)
        assert len(search.archive_AD) <= 10


def test_shade_remembers_the_lehmer_means_of_what_won():
    search = evolution(0, 3)
    told(search, search.propose(0), NONE)
    drawn = search.propose(1)
    gains = np.where(SLOTS < 4, SLOTS + 1.0, -1.0)
    told(search, drawn, -gains)
    F, CR, share = drawn.F_P[:4], drawn.CR_P[:4], gains[:4] / gains[:4].sum()
    assert search.memory_F[0] == pytest.approx((share * F**2).sum() / (share * F).sum())
    assert search.memory_CR[0] == pytest.approx((share * CR**2).sum() / (share * CR).sum())
    assert search.next_memory == 1
    np.testing.assert_array_equal(search.memory_F[1:], 0.5)


def with_parents(values) -> tuple[Evolution, Offspring]:
    """A population with these values, and its next generation."""
    search = evolution(3, strategy="shade")
    told(search, search.propose(0), values)
    return search, search.propose(1)


def test_late_results_of_a_generation_do_not_overwrite_what_the_others_taught():
    whole, drawn = with_parents(np.full(10, 5.0))
    whole.absorb(evaluated(drawn, np.arange(10) / 10), generation=2)
    parted, _ = with_parents(np.full(10, 5.0))
    groups = (evaluated(drawn, np.arange(10) / 10, slots=part) for part in (SLOTS[:9], SLOTS[9:]))
    parted.absorb(*groups, generation=2)
    np.testing.assert_array_equal(parted.memory_F, whole.memory_F)
    np.testing.assert_array_equal(parted.memory_CR, whole.memory_CR)
    assert parted.next_memory == whole.next_memory == 1


@pytest.mark.parametrize("penalty", [np.finfo(float).max, np.inf])
def test_penalties_of_any_size_leave_the_memory_finite(penalty):
    search, drawn = with_parents(np.full(10, penalty))
    told(search, drawn, [-np.finfo(float).max, *np.arange(9)])
    assert np.isfinite(search.memory_F).all()
    assert np.isfinite(search.memory_CR).all()


@pytest.mark.parametrize("unit", [1e-6, 1e6])
def test_the_unit_of_values_does_not_matter_where_a_parent_had_an_infinite_one(unit):
    memories = []
    for scale in (1.0, unit):
        search, drawn = with_parents(np.array([np.inf, *np.full(9, 5.0)]) * scale)
        told(search, drawn, np.arange(10) / 10 * scale)
        memories.append(search.memory_F[0])
    assert memories[1] == pytest.approx(memories[0], rel=1e-12)


def test_jade_follows_the_means_of_what_won():
    search = evolution(0, 3, strategy="jade")
    told(search, search.propose(0), NONE)
    drawn = search.propose(1)
    told(search, drawn, np.where(SLOTS < 4, -1.0, 1.0))
    F, CR = drawn.F_P[:4], drawn.CR_P[:4]
    assert search.memory_F[0] == pytest.approx(0.9 * 0.5 + 0.1 * (F**2).sum() / F.sum())
    assert search.memory_CR[0] == pytest.approx(0.9 * 0.9 + 0.1 * CR.mean())


def test_adaptive_scales_have_the_papers_distributions():
    """F is Cauchy(0.5, 0.1) given F > 0, cut at 1; CR is normal(0.9, 0.1) clipped."""
    search = evolution(0, 2, size=20_000)
    F, CR = search._scales(np.random.default_rng(0))
    rng = np.random.default_rng(1)
    cauchy = 0.5 + 0.1 * rng.standard_cauchy(50_000)
    expected = np.minimum(cauchy[cauchy > 0], 1)
    for quantile in (0.05, 0.25, 0.5, 0.75, 0.9):
        assert np.quantile(F, quantile) == pytest.approx(np.quantile(expected, quantile), abs=0.02)
    assert (F > 0).all()
    assert (F <= 1).all()
    assert np.median(CR) == pytest.approx(0.9, abs=0.01)


def test_dither_draws_a_scale_for_every_candidate():
    F, CR = evolution(0, 2, size=5000, strategy="best1", F=(0.5, 1.0))._scales(
        np.random.default_rng(0)
    )
    assert F.min() >= 0.5
    assert F.max() <= 1
    assert F.mean() == pytest.approx(0.75, abs=0.01)
    assert (CR == 0.9).all()


def test_bounds_are_repaired_as_their_names_say():
    outside = np.full((10, 1), 1.3)
    outside[5:] = -0.4
    parents = np.full((10, 1), 0.5)
    expected = {"clip": (1.0, 0.0), "midpoint": (0.75, 0.25), "reflect": (0.7, 0.4)}
    for bounds, (high, low) in expected.items():
        search = evolution(0, 1, bounds=bounds)
        search.rows_PD = parents
        repaired = search._repaired(outside, outside)[:, 0]
        np.testing.assert_allclose(repaired, [high] * 5 + [low] * 5)


def test_latin_hypercube_has_one_point_per_stratum_of_every_axis():
    points = latin_hypercube(np.random.default_rng(0), 7, 3)
    for column in points.T:
        assert sorted((column * 7).astype(int)) == list(range(7))


@pytest.mark.parametrize("strategy", get_args(Strategy))
def test_every_strategy_minimises_rosenbrock(strategy):
    def rosenbrock(rows):
        x, y = (4 * rows - 2).T
        return (1 - x) ** 2 + 100 * (y - x**2) ** 2

    _, values = minimise(rosenbrock, evolution(0, 2, size=20, strategy=strategy), 200)
    assert values.min() < 1e-4


def test_minimise_stops_when_it_has_converged_and_skips_nan():
    def bowl(rows):
        values = ((rows - 1 / 3) ** 2).sum(axis=1)
        return np.where(np.arange(len(rows)) == 4, np.nan, values)

    tried, values = minimise(bowl, evolution(3), 500, absolute=1e-6)
    assert len(values) == 5000  # a slot that only fails never has a value to converge
    tried, values = minimise(lambda rows: bowl(rows[:4]).repeat(3)[:10], evolution(3), 5)
    assert tried.shape == (50, 3)
    _, values = minimise(
        lambda rows: ((rows - 1 / 3) ** 2).sum(axis=1), evolution(3), 500, absolute=1e-6
    )
    assert len(values) < 2000


def test_convergence_is_scipys_criterion():
    assert has_converged(np.array([1.0, 1.01]), NONE, relative=0.01, absolute=0)
    assert not has_converged(np.array([1.0, 1.1]), NONE, relative=0.01, absolute=0)
    assert has_converged(np.array([1.0, 1.1]), NONE, relative=0, absolute=0.051)
    assert has_converged(np.ones(2), NONE, relative=0, absolute=0)
    assert not has_converged(np.array([1.0, np.inf]), NONE, relative=1, absolute=1)
    assert not has_converged(np.ones(2), np.array([0, 1e-9]), relative=1, absolute=1)


def test_categories_change_by_chance_not_by_difference():
    """Columns of categories come from the base, the attractor, or a new draw: never from sums."""
    nominal = np.array([True, False])
    grid = lambda rows: np.where(nominal, np.floor(rows * 4), rows)  # noqa: E731
    search = Evolution(Rules(40, CR=1.0, seed=3), np.zeros(2, bool), nominal, grid)
    search.values_P, search.violations_P = np.arange(40.0), np.zeros(40)
    search.rows_PD[:, 0] = 0.6
    stay = search.propose(1).rows_PD[:, 0]
    assert (stay == 0.6).all()
    search.rows_PD[::2, 0] = 0.1
    moved = search.propose(1).rows_PD[:, 0]
    assert set(np.floor(moved * 4)) == {0.0, 1.0, 2.0, 3.0}


def test_dropping_columns_keeps_the_rest_of_the_search():
    search = evolution(0, 3)
    told(search, search.propose(0), SLOTS)
    rows = search.rows_PD.copy()
    search.keep_columns(np.array([True, False, True]))
    np.testing.assert_array_equal(search.rows_PD, rows[:, [0, 2]])
    assert search.propose(1).rows_PD.shape == (10, 2)


def test_rules_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Rules(10).seed = 2
