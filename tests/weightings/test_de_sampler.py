"""DESampler in one process: Optuna's conformance classes, bit-identity, and untidy studies."""

import math
import pickle
import time
import weakref
from collections import Counter
from collections.abc import Callable
from typing import get_args

import numpy as np
import optuna
import pytest
from optuna.distributions import (
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.testing.pytest_samplers import (
    BasicSamplerTestCase,
    RelativeSamplerTestCase,
    SingleOnlySamplerTestCase,
)
from optuna.trial import TrialState

from kd.weightings.de_sampler import (
    SEED_ATTRIBUTE,
    DEConvergedCallback,
    DESampler,
    GenerationJournalBackend,
    PrefetchObjective,
    optimize_population,
)
from kd.weightings.de_sampler.space import Axis, Space
from kd.weightings.evolution import Strategy

STRATEGIES = get_args(Strategy)
SIMPLEX = tuple(f"w{k}" for k in range(4))
TARGET = np.array([0.5, 0.3, 0.2, 0.0])
MIXED = {
    "rate": FloatDistribution(1e-5, 1e-1, log=True),
    "share": FloatDistribution(-2.0, 1.0),
    "tenth": FloatDistribution(0.0, 1.0, step=0.1),
    "layers": IntDistribution(1, 9, step=2),
    "width": IntDistribution(1, 512, log=True),
    "norm": CategoricalDistribution(["batch", "layer", None]),
}


@pytest.fixture(autouse=True)
def _quiet():
    optuna.logging.set_verbosity(optuna.logging.WARNING)


class TestConformance(BasicSamplerTestCase, RelativeSamplerTestCase, SingleOnlySamplerTestCase):
    """Optuna's own battery."""

    @pytest.fixture(params=STRATEGIES)
    def sampler(self, request) -> Callable[[], DESampler]:
        return lambda: DESampler(strategy=request.param)


def batch(rows_PD: np.ndarray) -> np.ndarray:
    """Element by element, so that a row's value does not depend on the batch it is in."""
    return np.array(
        [sum((x - t) ** 2 for x, t in zip(row, TARGET, strict=True)) for row in rows_PD]
    )


def single(trial: optuna.Trial) -> float:
    return batch(np.array([[trial.suggest_float(name, 0, 1) for name in SIMPLEX]]))[0]


def mixed_batch(rows_PD: np.ndarray) -> np.ndarray:
    return np.array(
        [(math.log(r[0]) + 7) ** 2 + r[1] ** 2 + r[2] + r[3] + r[4] / 99 + r[5] for r in rows_PD]
    )


def mixed_single(trial: optuna.Trial) -> float:
    row = [
        trial.suggest_float("rate", 1e-5, 1e-1, log=True),
        trial.suggest_float("share", -2, 1),
        trial.suggest_float("tenth", 0, 1, step=0.1),
        trial.suggest_int("layers", 1, 9, step=2),
        trial.suggest_int("width", 1, 512, log=True),
        ["batch", "layer", None].index(
            trial.suggest_categorical("norm", ["batch", "layer", None])
        ),
    ]
    return mixed_batch([row])[0]


def new_study(storage=None, direction="minimize", **kw) -> optuna.Study:
    sampler = DESampler(**{"simplex": SIMPLEX, "seed": 3, "population_size": 10, **kw})
    return optuna.create_study(
        storage=storage, sampler=sampler, study_name="s", load_if_exists=True, direction=direction
    )


def params(study: optuna.Study) -> list[dict]:
    return [trial.params for trial in study.get_trials(deepcopy=False)]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sequential_batched_and_twice_resumed_searches_are_bit_identical(strategy):
    sequential = new_study(strategy=strategy)
    sequential.optimize(single, n_trials=400)
    expected = params(sequential)

    prefetched = new_study(strategy=strategy)
    prefetched.optimize(PrefetchObjective(batch), n_trials=400)
    assert params(prefetched) == expected

    for persist in ("trials", "add_trials"):
        batched = new_study(strategy=strategy)
        optimize_population(batched, batch, 40, persist)
        assert params(batched) == expected

    storage = optuna.storages.InMemoryStorage()
    for until in (57, 233, 400):
        resumed = new_study(storage, strategy=strategy)
        resumed.optimize(single, n_trials=until - len(resumed.trials))
    assert params(resumed) == expected

    storage = optuna.storages.InMemoryStorage()
    new_study(storage, strategy=strategy).optimize(single, n_trials=33)
    resumed = new_study(storage, strategy=strategy)
    optimize_population(resumed, batch, 37)
    assert params(resumed) == expected


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("given", [True, False])
def test_mixed_spaces_resume_bit_identically_given_or_define_by_run(strategy, given):
    kw = {"simplex": None, "strategy": strategy, "search_space": MIXED if given else None}
    sequential = new_study(**kw)
    sequential.optimize(mixed_single, n_trials=150)
    storage = optuna.storages.InMemoryStorage()
    for until in (7, 91, 150):
        resumed = new_study(storage, **kw)
        resumed.optimize(mixed_single, n_trials=until - len(resumed.trials))
    assert params(resumed) == params(sequential)
    if given:
        prefetched = new_study(**kw)
        prefetched.optimize(PrefetchObjective(mixed_batch), n_trials=150)
        assert params(prefetched) == params(sequential)


def test_maximising_the_negative_is_the_same_search():
    down, up = new_study(), new_study(direction="maximize")
    down.optimize(PrefetchObjective(batch), n_trials=100)
    up.optimize(PrefetchObjective(lambda rows: -batch(rows)), n_trials=100)
    assert params(up) == params(down)
    _, down_values = down.sampler.population(down)
    _, up_values = up.sampler.population(up)
    np.testing.assert_array_equal(up_values, -down_values)


def test_every_simplex_trial_is_on_the_simplex_and_the_optimum_on_a_face_is_reached():
    study = new_study(population_size=20)
    study.optimize(PrefetchObjective(batch), n_trials=1500)
    rows = np.array([[p[name] for name in SIMPLEX] for p in params(study)])
    assert (rows >= 0).all()
    np.testing.assert_allclose(rows.sum(axis=1), 1, atol=1e-12)
    assert study.best_value < 1e-9
    assert study.best_params["w3"] < 1e-4


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("bounds", ["midpoint", "clip", "reflect"])
def test_mixed_spaces_stay_in_range_and_improve(given, bounds):
    study = new_study(
        simplex=None, search_space=MIXED if given else None, population_size=20, bounds=bounds
    )
    study.optimize(mixed_single, n_trials=600)
    values = [trial.value for trial in study.trials]
    assert min(values[300:]) < min(values[:20])
    assert study.best_value < 3
    for trial in study.get_trials(deepcopy=False):
        for name, distribution in trial.distributions.items():
            assert distribution._contains(distribution.to_internal_repr(trial.params[name]))
    tenths = np.array([p["tenth"] for p in params(study)]) * 10
    np.testing.assert_allclose(tenths, tenths.round(), atol=1e-9)
    assert all(p["layers"] % 2 for p in params(study))


def test_the_initial_population_is_a_latin_hypercube_in_both_ways_of_giving_the_space():
    for space in ({"x": FloatDistribution(0, 1), "y": FloatDistribution(0, 1)}, None):
        study = new_study(simplex=None, search_space=space, population_size=12)
        study.optimize(lambda t: t.suggest_float("x", 0, 1) + t.suggest_float("y", 0, 1), 12)
        for name in "xy":
            strata = sorted(int(p[name] * 12) for p in params(study))
            assert strata == list(range(12))


def test_all_categories_and_all_places_of_a_grid_have_equal_shares():
    space = {name: MIXED[name] for name in ("norm", "layers")}
    study = new_study(simplex=None, search_space=space, population_size=30)

    def objective(trial: optuna.Trial) -> float:
        trial.suggest_categorical("norm", ["batch", "layer", None])
        return trial.suggest_int("layers", 1, 9, step=2)

    study.optimize(objective, n_trials=30)
    assert Counter(p["norm"] for p in params(study)) == dict.fromkeys(["batch", "layer", None], 10)
    assert Counter(p["layers"] for p in params(study)) == dict.fromkeys(range(1, 10, 2), 6)


def test_logarithmic_parameters_are_drawn_on_a_logarithmic_scale():
    study = new_study(
        simplex=None, search_space={"r": FloatDistribution(1e-6, 1, log=True)}, population_size=40
    )
    study.optimize(lambda t: t.suggest_float("r", 1e-6, 1, log=True), n_trials=40)
    rates = [p["r"] for p in params(study)]
    assert np.median(rates) == pytest.approx(1e-3, rel=0.5)
    space = {"k": IntDistribution(1, 4, log=True)}
    study = new_study(simplex=None, search_space=space, population_size=40)
    study.optimize(lambda t: t.suggest_int("k", 1, 4, log=True), n_trials=40)
    counts = Counter(p["k"] for p in params(study))
    assert counts[1] == 20, "from 0.5 to 1.5 is half of the way from 0.5 to 4.5"
    assert counts[4] in (4, 5)


@pytest.mark.parametrize("strategy", ["jade", "shade", "rand1"])
def test_a_pruned_and_a_failed_trial_per_generation_cost_no_repeated_vector(strategy):
    def untidy(trial: optuna.Trial) -> float:
        value = single(trial)
        if trial.number % 10 == 3:
            raise optuna.TrialPruned
        return float("nan") if trial.number % 10 == 7 else value

    study = new_study(strategy=strategy)
    study.optimize(untidy, n_trials=400)
    states = [trial.state for trial in study.get_trials(deepcopy=False)]
    assert states.count(TrialState.PRUNED) == states.count(TrialState.FAIL) == 40
    assert len({tuple(p.values()) for p in params(study)}) == 400
    clean = new_study(strategy=strategy)
    clean.optimize(single, n_trials=400)
    assert study.best_value < max(10 * clean.best_value, 1e-3)


def test_duplicates_are_replaced_when_the_optimum_is_a_corner():
    study = new_study(strategy="best1", population_size=10)
    study.optimize(PrefetchObjective(lambda rows: 1 - rows[:, 0]), n_trials=600)
    unique = {tuple(p.values()) for p in params(study)}
    assert study.best_value == 0
    assert len(unique) > 590


def test_a_search_that_only_fails_goes_on():
    study = new_study()
    study.optimize(lambda trial: single(trial) * float("nan"), n_trials=35)
    study.optimize(single, n_trials=35)
    assert math.isfinite(study.best_value)


def test_infinite_values_are_values():
    study = new_study()
    study.optimize(lambda trial: math.inf if single(trial) > 0.1 else single(trial), n_trials=200)
    assert study.best_value < 0.1


def test_pruned_trials_compete_when_asked_to():
    def pruned(trial: optuna.Trial) -> float:
        value = single(trial)
        if trial.number:  # the first one is pruned before it has a value
            trial.report(value, 0)
        raise optuna.TrialPruned

    for considered in (True, False):
        study = new_study(consider_pruned_trials=considered)
        study.optimize(pruned, n_trials=20)
        _, values = study.sampler.population(study)
        assert np.isfinite(values).all() == considered


def test_enqueued_and_added_trials_join_the_population_and_are_improved_on():
    study = new_study()
    good = dict(zip(SIMPLEX, [0.49, 0.31, 0.2, 0.0], strict=True))
    study.enqueue_trial(good)
    study.optimize(PrefetchObjective(batch), n_trials=10)
    assert params(study)[0] == good
    rows, values = study.sampler.population(study)
    np.testing.assert_allclose(rows[0], list(good.values()), atol=1e-15)
    assert values[0] == batch(np.array([list(good.values())]))[0]

    warm = new_study()
    space = {name: FloatDistribution(0, 1) for name in SIMPLEX}
    for trial in study.trials:
        warm.add_trial(trial)
    foreign = optuna.create_trial(params={"w0": 1.0}, distributions={"w0": space["w0"]}, value=-9)
    for _ in range(11):  # a whole generation of them, and one more
        warm.add_trial(foreign)
    warm.optimize(PrefetchObjective(batch), n_trials=89)
    assert warm.sampler.population(warm)[1].min() >= 0, "what lacks parameters does not compete"
    assert min(t.value for t in warm.trials[21:]) < values.min()


def test_enqueued_trials_of_a_mixed_space_join_the_population():
    study = new_study(simplex=None, search_space=MIXED)
    row = [1e-5, 1.0, 0.3, 9, 1, "layer"]  # ends of the ranges are in them
    study.enqueue_trial(dict(zip(MIXED, row, strict=True)))
    study.optimize(mixed_single, n_trials=10)
    rows, values = study.sampler.population(study)
    assert values[0] == study.trials[0].value == mixed_batch([[*row[:-1], 1]])[0]
    np.testing.assert_allclose(rows[0], [*row[:-1], 1])


def test_enqueued_weights_off_the_simplex_lend_their_value_to_no_other_point():
    def cheats(rows: np.ndarray) -> np.ndarray:
        return batch(rows) + np.minimum(rows.sum(axis=1) - 1, 0).round(5)

    study = new_study()
    study.enqueue_trial(dict.fromkeys(SIMPLEX, 0.0))
    study.enqueue_trial(dict.fromkeys(SIMPLEX, 0.2))
    thirds = {**dict.fromkeys(SIMPLEX, 0.3333333), "w3": 0.0}
    study.enqueue_trial(thirds)
    study.optimize(PrefetchObjective(cheats), n_trials=10)
    rows, values = study.sampler.population(study)
    assert np.isinf(values[:2]).all()
    np.testing.assert_allclose(rows[2], list(thirds.values()), atol=1e-6)
    assert rows[2].sum() == pytest.approx(1, abs=1e-15)
    study.optimize(PrefetchObjective(cheats), n_trials=190)
    rows, values = study.sampler.population(study)
    np.testing.assert_allclose(values, batch(rows), atol=1e-6)


@pytest.mark.parametrize("off", [{"n": 4, "x": 0.5}, {"n": 6, "x": 0.55}, {"n": 16, "x": 0.5}])
@pytest.mark.filterwarnings("ignore:Fixed parameter")
def test_enqueued_values_off_the_grid_lend_their_value_to_no_other_point(off):
    space = {"n": IntDistribution(1, 11, step=5), "x": FloatDistribution(0, 1, step=0.1)}
    study = new_study(simplex=None, search_space=space)
    study.enqueue_trial(off)
    study.optimize(PrefetchObjective(lambda rows: 1 + rows.sum(axis=1)), n_trials=1)
    study.sampler = DESampler(space, seed=3, population_size=10)
    study.optimize(PrefetchObjective(lambda rows: 100 + rows.sum(axis=1)), n_trials=19)
    assert study.trials[0].params == off
    assert study.sampler.population(study)[1].min() >= 100


@pytest.mark.parametrize(
    "grid",
    [
        IntDistribution(1, 9, step=2),
        FloatDistribution(-1, 1, step=0.5),
        CategoricalDistribution([None, "a", "b"]),
    ],
)
def test_a_value_of_a_grid_is_encoded_as_the_middle_of_its_share(grid):
    axis, num = Axis.of(grid), 3 if isinstance(grid, CategoricalDistribution) else 5
    middles_P = (np.arange(num) + 0.5) / num
    assert [axis.encoded(value) for value in axis.shown(axis.decoded(middles_P))] == [*middles_P]
    assert axis.decoded(np.array([0.0, 1.0])).tolist() == [axis.low, axis.high]


def test_the_end_of_the_unit_interval_is_the_same_float_as_its_share():
    axis = Axis.of(FloatDistribution(-0.8, 0.1, step=0.1))  # -0.8 + 9 * 0.1 < 0.1
    inside, end = axis.decoded(np.array([0.99, 1.0]))
    assert inside == end


def test_parameters_with_one_value_are_columns_like_others():
    space = {
        "x": FloatDistribution(0, 1),
        "only": CategoricalDistribution(["this"]),
        "k": IntDistribution(3, 3),
        "y": FloatDistribution(0, 1),
    }
    expected = {"only": "this", "k": 3}

    def objective(rows_PA):
        assert rows_PA.shape[1] == 4
        assert (rows_PA[:, 1] == 0).all()
        assert (rows_PA[:, 2] == 3).all()
        return (rows_PA[:, 0] - 0.3) ** 2 + (rows_PA[:, 3] - 0.7) ** 2

    prefetched = new_study(simplex=None, search_space=space)
    prefetched.optimize(PrefetchObjective(objective), n_trials=60)
    added = new_study(simplex=None, search_space=space)
    optimize_population(added, objective, 6)
    assert params(added) == params(prefetched)
    assert all(trial.params.items() >= expected.items() for trial in prefetched.trials)
    without = {name: space[name] for name in ("x", "y")}
    bare = new_study(simplex=None, search_space=without)
    optimize_population(bare, lambda rows: objective(np.insert(rows, 1, [[0], [3]], axis=1)), 6)
    assert params(bare) == [{n: t[n] for n in without} for t in params(added)]
    assert len(prefetched.sampler.population(prefetched)[0][0]) == 4


def test_a_parameter_with_one_value_need_not_be_asked_for():
    space = {"x": FloatDistribution(0, 1), "k": IntDistribution(3, 3)}
    study = new_study(simplex=None, search_space=space)
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=30)
    assert np.isfinite(study.sampler.population(study)[1]).all()


def test_partly_enqueued_trials_take_the_rest_from_their_row():
    plain, enqueued = new_study(), new_study()
    enqueued.enqueue_trial({"w1": 0.25})
    for study in (plain, enqueued):
        study.optimize(PrefetchObjective(batch), n_trials=1)
    assert params(enqueued)[0] == {**params(plain)[0], "w1": 0.25}
    assert enqueued.trials[0].value == batch(np.array([list(params(enqueued)[0].values())]))[0]


def test_debs_rules_prefer_feasible_then_less_violating():
    space = {"x": FloatDistribution(0, 1), "y": FloatDistribution(0, 1)}

    def constrained(trial: optuna.Trial) -> float:
        x, y = trial.suggest_float("x", 0, 1), trial.suggest_float("y", 0, 1)
        trial.set_constraint("sum", 1.2 - (x + y))
        return x + y

    study = new_study(simplex=None, search_space=space, population_size=20)
    study.optimize(constrained, n_trials=800)
    _, values = study.sampler.population(study)
    assert (values >= 1.2).all()
    assert values.min() == pytest.approx(1.2, abs=1e-3)


def test_conditional_and_dynamic_parameters_fall_back_to_independent_sampling():
    def objective(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", -1, 1)
        if trial.suggest_categorical("branch", ["a", "b"]) == "a":
            return x**2 + trial.suggest_float("only_a", 0, 1)
        return x**2 + trial.suggest_float("late", 0, 1 + trial.number)

    study = new_study(simplex=None)
    study.optimize(objective, n_trials=300)
    space = study.sampler.infer_relative_search_space(study, study.trials[-1])
    assert sorted(space) == ["branch", "x"]
    assert study.best_value < 0.05


def test_an_independent_sampler_can_be_given():
    class Half(optuna.samplers.RandomSampler):
        def sample_independent(self, study, trial, name, distribution):
            return 0.5

    study = new_study(simplex=None, independent_sampler=Half())
    study.optimize(lambda t: t.suggest_float("x", 0, 1), n_trials=3)
    assert params(study) == [{"x": 0.5}] * 3


@pytest.mark.filterwarnings("ignore:PartialFixedSampler is experimental")
def test_the_other_parameters_are_searched_where_optuna_fixes_one():
    space = {"x": FloatDistribution(0, 1), "y": FloatDistribution(0, 1)}
    study = new_study(simplex=None, search_space=space)
    free = study.sampler
    study.sampler = optuna.samplers.PartialFixedSampler({"x": 0.25}, free)
    study.optimize(
        lambda t: abs(t.suggest_float("x", 0, 1) - t.suggest_float("y", 0, 1)), n_trials=200
    )
    assert {trial.params["x"] for trial in study.trials} == {0.25}
    study.sampler = free
    rows, _ = free.population(study)
    np.testing.assert_allclose(rows, 0.25, atol=0.01)


def test_reseeding_reaches_the_independent_sampler():
    sampler = new_study(independent_sampler=optuna.samplers.RandomSampler(seed=1)).sampler
    twins = [pickle.loads(pickle.dumps(sampler)) for _ in range(2)]
    drawn = []
    for twin in twins:
        twin.reseed_rng()
        study = optuna.create_study(sampler=twin)
        study.optimize(lambda trial: trial.suggest_float("other", 0, 1), n_trials=1)
        drawn.append(study.trials[0].params["other"])
    assert drawn[0] != drawn[1]


def test_without_a_seed_the_study_keeps_the_one_that_was_drawn():
    storage = optuna.storages.InMemoryStorage()
    first = new_study(storage, seed=None)
    first.optimize(single, n_trials=25)
    resumed = new_study(storage, seed=None)
    resumed.optimize(single, n_trials=25)
    seed = next(iter(resumed._storage.get_study_system_attrs(resumed._study_id).values()))
    again = new_study(seed=seed)
    again.optimize(single, n_trials=50)
    assert params(resumed) == params(again)
    other = new_study(seed=None)
    other.optimize(single, n_trials=1)
    assert params(other)[0] != params(again)[0]


def test_a_seed_that_another_process_stored_at_the_same_time_holds_for_both():
    storage = optuna.storages.InMemoryStorage()
    study = new_study(storage, seed=None)
    study.optimize(single, n_trials=5)
    storage.set_study_system_attr(study._study_id, SEED_ATTRIBUTE, 7)  # it had seen none either
    other = new_study(storage, seed=None)
    other.optimize(single, n_trials=5)
    seeded = new_study(storage, seed=7)
    rows = [each.sampler.generation(each).rows for each in (study, other, seeded)]
    assert rows[0] == rows[1] == rows[2]
    study.optimize(single, n_trials=15)
    rows = [each.sampler.generation(each).rows for each in (study, other, seeded)]
    assert rows[0] == rows[1] == rows[2]


@pytest.mark.parametrize("seed", [3, None])
def test_no_trial_gets_a_system_attribute_and_each_generation_reads_the_storage_once(seed):
    class Spy(optuna.storages.InMemoryStorage):
        reads = 0

        def get_all_trials(self, study_id, deepcopy=True, states=None):
            self.reads += states is None  # with states it is Optuna's own queue of waiting trials
            return super().get_all_trials(study_id, deepcopy, states)

    storage = Spy()
    study = new_study(storage, seed=seed)
    storage.reads = 0
    study.optimize(single, n_trials=200)
    assert 0 < storage.reads <= 20 + (seed is None)  # whose first generation is drawn twice
    assert not any(trial.system_attrs for trial in study.trials)


@pytest.mark.parametrize("generations", [1, 5])
def test_every_trial_is_absorbed_once_however_late_it_finishes(generations, monkeypatch):
    absorbed, row_of = [], Space.row_of

    def noted(space, trial):
        absorbed.append(trial.number)
        return row_of(space, trial)

    monkeypatch.setattr(Space, "row_of", noted)
    study = new_study()
    late = study.ask({name: FloatDistribution(0, 1) for name in SIMPLEX})
    study.optimize(single, n_trials=9 + 10 * generations)
    study.tell(late, -1)
    study.optimize(single, n_trials=10)
    rows, values = study.sampler.population(study)
    assert [values[0], *rows[0]] == pytest.approx([-1, *late.params.values()], abs=1e-15)
    assert sorted(absorbed) == list(range(len(study.trials)))


def test_a_long_search_does_not_keep_its_old_generations():
    study, objective = new_study(), PrefetchObjective(batch)
    study.optimize(objective, n_trials=5)
    old = weakref.ref(study.sampler.generation(study))
    study.optimize(objective, n_trials=50)
    assert old() is None


def test_a_sampler_survives_pickling_and_serves_other_studies():
    study = new_study()
    study.optimize(single, n_trials=25)
    expected = new_study()
    expected.optimize(single, n_trials=60)
    study.sampler = pickle.loads(pickle.dumps(study.sampler))
    study.optimize(single, n_trials=35)
    assert params(study) == params(expected)

    elsewhere = new_study()
    beside = optuna.create_study(storage=elsewhere._storage)
    for other in (elsewhere, beside):
        other.sampler = study.sampler
        other.optimize(single, n_trials=60)
        assert params(other) == params(expected)
    objective = pickle.loads(pickle.dumps(PrefetchObjective(batch)))
    third = new_study()
    third.optimize(objective, n_trials=60)
    assert params(third) == params(expected)


def test_threads_share_one_sampler_and_lose_nothing():
    study = new_study()
    study.optimize(PrefetchObjective(batch), n_trials=200, n_jobs=4)
    assert len({tuple(p.values()) for p in params(study)}) >= 198
    assert study.best_value < 1e-2


def test_hyperband_does_not_hide_trials_from_the_population():
    def reporting(trial: optuna.Trial) -> float:
        value = single(trial)
        for step in range(1, 9):
            trial.report(value, step)
            if trial.should_prune():
                raise optuna.TrialPruned
        return value

    sampler = DESampler(simplex=SIMPLEX, seed=0, population_size=10)
    study = optuna.create_study(sampler=sampler, pruner=optuna.pruners.HyperbandPruner())
    study.optimize(reporting, n_trials=200)
    complete = [t for t in study.trials if t.state == TrialState.COMPLETE]
    _, values = sampler.population(study)
    assert values.min() == min(t.value for t in complete)


def test_the_generation_tells_its_trials_in_advance():
    study = new_study()
    study.optimize(single, n_trials=20)
    for _ in range(25):
        study.enqueue_trial({})  # waits for its turn, and then takes all from its row
    generation = study.sampler.generation(study)
    assert (generation.number, generation.first_trial) == (2, 20)
    study.optimize(single, n_trials=10)
    assert [list(p.values()) for p in params(study)[20:30]] == generation.rows
    np.testing.assert_array_equal(generation.params, generation.rows)


@pytest.mark.parametrize("given", [True, False])
def test_reading_a_search_whose_trials_are_running_does_not_change_it(given):
    space = {name: FloatDistribution(0, 1) for name in SIMPLEX}

    def searched(look: bool) -> optuna.Study:
        storage = optuna.storages.InMemoryStorage()
        study = new_study(storage, simplex=None, search_space=space if given else None)
        study.optimize(single, n_trials=20)
        delayed: list[optuna.Trial] = []
        for generation in range(6):
            *trials, late = (study.ask(space) for _ in range(10))
            trials += delayed[:-1]  # those that take two generations longer
            delayed = [*delayed[-1:], late]
            for trial in trials:
                if look:  # with none, some or most of them finished
                    study.sampler.population(study)
                    study.sampler.generation(study)
                    assert not DEConvergedCallback().holds(study)
                study.tell(trial, batch(np.array([list(trial.params.values())]))[0])
            if generation == 2:
                study = new_study(storage, simplex=None, search_space=space if given else None)
        return study

    assert params(searched(look=True)) == params(searched(look=False))


def test_a_look_sees_what_has_finished_before_the_generation_of_the_next_trial():
    study = new_study()
    trials = [study.ask() for _ in range(10)]
    for finished, trial in enumerate(trials):
        _, values = study.sampler.population(study)
        assert np.isfinite(values).sum() == finished
        study.tell(trial, single(trial))


@pytest.mark.parametrize("objective", [PrefetchObjective(batch), single])
def test_a_convergence_check_does_not_change_a_search_whose_trials_wait(objective):
    studies = new_study(), new_study()
    for study, callbacks in zip(studies, ([], [DEConvergedCallback(0, 1e-12)]), strict=True):
        for step in range(100):  # better and better
            study.enqueue_trial(
                dict(zip(SIMPLEX, [1 - step / 200, step / 200, 0, 0], strict=True))
            )
        study.optimize(objective, n_trials=140, callbacks=callbacks)
    assert params(studies[0]) == params(studies[1])


def test_what_a_search_gives_away_is_not_its_own():
    def spoils(rows: np.ndarray) -> np.ndarray:
        values = batch(rows)
        rows[:] = 0
        return values

    study, expected = new_study(), new_study()
    study.optimize(PrefetchObjective(spoils), n_trials=50)
    study.sampler.population(study)[0][:] = 0
    study.optimize(PrefetchObjective(spoils), n_trials=50)
    expected.optimize(single, n_trials=100)
    assert params(study) == params(expected)


def test_a_trial_that_is_generations_old_is_evaluated_on_its_own():
    study = new_study()
    trials = [study.ask() for _ in range(60)]
    objective = PrefetchObjective(batch)
    for trial in reversed(trials):
        value = objective(trial)
        assert value == batch(np.array([[trial.params[name] for name in SIMPLEX]]))[0]


def test_a_population_that_has_converged_stops_the_study():
    study = new_study(population_size=20)
    study.optimize(
        PrefetchObjective(batch), n_trials=5000, callbacks=[DEConvergedCallback(0, 1e-6)]
    )
    assert len(study.trials) < 2000
    assert len(study.trials) % 20 == 0
    assert study.best_value < 1e-5


def test_a_population_has_not_converged_while_a_member_is_infeasible():
    def constrained(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", 0, 1)
        trial.set_constraint("x", 0.99 - x)
        return 100 + x  # alike wherever x is

    space = {"x": FloatDistribution(0, 1)}
    study = new_study(simplex=None, search_space=space, population_size=20)
    study.optimize(constrained, n_trials=2000, callbacks=[DEConvergedCallback()])
    rows, _ = study.sampler.population(study)
    assert (rows >= 0.99).all()
    assert 20 < len(study.trials) < 2000


def test_a_batch_objective_that_says_nan_fails_that_trial_alone():
    def some_nan(rows: np.ndarray) -> np.ndarray:
        return np.where(np.arange(len(rows)) == 2, np.nan, batch(rows))

    for persist in ("trials", "add_trials"):
        study = new_study()
        optimize_population(study, some_nan, 3, persist)
        failed = [t.number for t in study.trials if t.state == TrialState.FAIL]
        assert failed == [2, 12, 22]


@pytest.mark.parametrize("waiting", [0, 3, 7, 10, 23])
def test_whole_generations_are_finished_where_trials_wait(waiting):
    study = new_study()
    for _ in range(waiting):
        study.enqueue_trial({"w0": 0.5, "w1": 0.5, "w2": 0.0, "w3": 0.0})
    optimize_population(study, batch, 2, persist="trials")
    states = [trial.state for trial in study.trials]
    assert states[:20] == [TrialState.COMPLETE] * 20
    assert states[20:] == [TrialState.WAITING] * max(0, waiting - 20)


def test_trials_that_were_left_waiting_in_an_old_generation_are_finished_first():
    study = new_study()
    for _ in range(3):
        study.enqueue_trial({"w0": 0.5, "w1": 0.5, "w2": 0.0, "w3": 0.0})
    optimize_population(study, batch, 6, persist="add_trials")
    optimize_population(study, batch, 1, persist="trials")
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 60


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"strategy": "best2"}, "strategy is 'best2'"),
        ({"population_size": 3}, "population_size is 3; it must be at least 4"),
        ({"F": 0.0}, "F is 0.0"),
        ({"F": (0.9, 0.5)}, r"F is \(0.9, 0.5\)"),
        ({"F": [0.5]}, r"F is \(0.5,\); it must be in \(0, 2\], or a pair"),
        ({"CR": 1.5}, "CR is 1.5"),
        ({"p": 0.0}, "p is 0.0"),
        ({"memory_size": 0}, "memory_size is 0"),
        ({"archive_rate": -1}, "archive_rate is -1"),
        ({"init": "sobol"}, "init is 'sobol'"),
        ({"bounds": "wrap"}, "bounds is 'wrap'"),
        ({"seed": -1}, "seed is -1"),
        ({"simplex": ["x"], "search_space": {"x": FloatDistribution(0, 2)}}, "simplex names 'x'"),
        ({"simplex": ["y"], "search_space": {"x": FloatDistribution(0, 1)}}, "simplex names 'y'"),
    ],
)
def test_arguments_out_of_range_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        DESampler(**wrong)


def test_scales_may_come_in_any_sequence():
    listed, paired = (new_study(strategy="rand1", F=F) for F in ([0.4, 0.6], (0.4, 0.6)))
    for study in (listed, paired):
        study.optimize(single, n_trials=30)
    assert params(listed) == params(paired)


@pytest.mark.parametrize("wrong", [None, np.zeros(11), np.zeros(9), np.zeros((10, 1)), 0.0])
@pytest.mark.parametrize(
    "drive",
    [
        lambda study, objective: optimize_population(study, objective, 1, "trials"),
        lambda study, objective: optimize_population(study, objective, 1, "add_trials"),
        lambda study, objective: study.optimize(PrefetchObjective(objective), n_trials=10),
    ],
)
def test_a_batch_objective_must_return_a_value_per_row(wrong, drive):
    study = new_study()
    with pytest.raises(ValueError, match=r"of shape .* for 10 rows; it must return \(10,\)"):
        drive(study, lambda rows: wrong)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_trials_whose_evaluation_is_interrupted_have_failed(error):
    def interrupted(rows):
        raise error

    study = new_study()
    optimize_population(study, batch, 1, "trials")
    with pytest.raises(error):
        optimize_population(study, interrupted, 1, "trials")
    states = [trial.state for trial in study.trials]
    assert states == [TrialState.COMPLETE] * 10 + [TrialState.FAIL] * 10


def test_threads_evaluate_each_generation_once():
    rows = []

    def counting(rows_PD):
        rows.append(len(rows_PD))
        time.sleep(0.01)
        return batch(rows_PD)

    study = new_study()
    study.optimize(PrefetchObjective(counting), n_trials=200, n_jobs=8)
    assert rows.count(10) == 20


def test_helpers_say_what_they_need():
    random = optuna.create_study(sampler=optuna.samplers.RandomSampler())
    with pytest.raises(ValueError, match="it must be a DESampler"):
        optimize_population(random, batch, 1)
    unknown = optuna.create_study(sampler=DESampler())
    for needs_the_space in (
        unknown.sampler.population,
        DEConvergedCallback().holds,
        lambda study: optimize_population(study, batch, 1),
    ):
        with pytest.raises(ValueError, match="give DESampler a search_space"):
            needs_the_space(unknown)
    with pytest.raises(ValueError, match="neither may be negative"):
        DEConvergedCallback(-1)
    with pytest.raises(ValueError, match="trials_per_commit is 0"):
        GenerationJournalBackend("unused", 0)


def test_the_population_size_follows_the_dimensions():
    sizes = {
        3: 20,
        5: 20,
        6: 40,
        20: 40,
        21: 42,
    }
    for dimensions, size in sizes.items():
        space = {f"x{i}": FloatDistribution(0, 1) for i in range(dimensions)}
        assert DESampler(space).population_size == size
    assert DESampler().population_size == 20
