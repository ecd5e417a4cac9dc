import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from kd.component import ConfigError
from kd.weightings import ExpectationMaximization
from kd.weightings.objectives import MixtureNLL
from kd.weightings.simplex import from_cube
from tests.checks_weightings import names
from tests.reference_weightings import random_logits


@settings(max_examples=25, deadline=None)
@given(members=st.integers(2, 8), seed=st.integers(0, 2**32), spread=st.floats(0.5, 4))
def test_no_other_weights_are_better_than_the_certificate_allows(members, seed, spread):
    logits_KNC, labels_N = random_logits(members, 80, 4, seed, spread)
    found = ExpectationMaximization().find(logits_KNC, labels_N, names(members), 0)
    assert found.gap <= 1e-12
    nll = MixtureNLL(logits_KNC, labels_N)
    near = 0.99 * found.weights_K + 0.01 * from_cube(
        np.random.default_rng(seed).random((200, members))
    )
    others_PK = np.concatenate([near, np.eye(members)])
    assert nll(others_PK).min() >= found.objective - found.gap - 1e-12


def test_it_agrees_with_scipy_on_the_same_convex_problem():
    logits_KNC, labels_N = random_logits(5, 200, 6)
    nll = MixtureNLL(logits_KNC, labels_N)
    theirs = minimize(
        lambda w: nll(w[None])[0],
        np.full(5, 0.2),
        method="SLSQP",
        bounds=[(0, 1)] * 5,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        options={"ftol": 1e-12, "maxiter": 500},
    )
    found = ExpectationMaximization().find(logits_KNC, labels_N, names(5), 0)
    assert found.objective == pytest.approx(theirs.fun, abs=1e-8)
    np.testing.assert_allclose(found.weights_K, theirs.x, atol=1e-3)


def test_the_certificate_bounds_the_gap_of_any_weights():
    logits_KNC, labels_N = random_logits(4, 100, 5)
    nll = MixtureNLL(logits_KNC, labels_N)
    best = ExpectationMaximization().minimum(nll)[0]
    weights_K, gap, _ = ExpectationMaximization(iterations=3).minimum(nll)
    assert 0 < nll(weights_K[None])[0] - nll(best[None])[0] <= gap


def test_useless_members_get_exactly_nothing():
    logits_KNC, labels_N = random_logits(3, 200, 4)
    logits_KNC[2] = -9 * np.eye(4)[labels_N]
    found = ExpectationMaximization().find(logits_KNC, labels_N, names(3), 0)
    assert found.weights["c"] == 0.0


def test_twins_share_and_the_nll_never_rises_on_the_way():
    logits_KNC, labels_N = random_logits(2, 100, 4)
    twins = np.concatenate([logits_KNC, logits_KNC[:1]])
    found = ExpectationMaximization().find(twins, labels_N, names(3), 0)
    alone = ExpectationMaximization().find(logits_KNC, labels_N, names(2), 0)
    assert found.objective == pytest.approx(alone.objective, abs=2e-9)
    assert found.weights["a"] == pytest.approx(found.weights["c"])
    assert (np.diff(found.history.best_G) <= 1e-12).all()


@pytest.mark.parametrize("iterations", [1, 2])
def test_stopping_early_is_said(iterations):
    logits_KNC, labels_N = random_logits(3, 400, 4)
    weighting = ExpectationMaximization(iterations=iterations)
    found = weighting.find(logits_KNC, labels_N, names(3), 0)
    assert f"after {iterations} steps" in found.warnings[0]
    assert found.gap > 1e-9
    assert found.evaluations == iterations


def test_a_single_step_is_uniform_with_its_gap():
    logits_KNC, labels_N = random_logits(3, 400, 4)
    found = ExpectationMaximization(iterations=1).find(logits_KNC, labels_N, names(3), 0)
    assert found.weights_K.tolist() == [1 / 3] * 3
    assert found.evaluations == 1
    assert found.gap > 1e-9


@pytest.mark.parametrize("margin", [8, 12, 16, 20])
@pytest.mark.parametrize("members", [2, 3, 4])
def test_members_that_are_almost_perfect_take_no_more_steps_than_others(members, margin):
    """Of members that are right by wide margins, the surest gets everything."""
    labels_N = np.arange(75) % 4
    noise_KNC = np.random.default_rng(members).normal(size=(members, 75, 4))
    margins_K11 = margin - np.arange(members)[:, None, None]
    logits_KNC = margins_K11 * np.eye(4)[labels_N] + noise_KNC
    found = ExpectationMaximization().find(logits_KNC, labels_N, names(members), 0)
    assert found.weights_K.tolist() == [1.0] + [0.0] * (members - 1)
    assert found.gap <= 1e-12
    assert found.evaluations <= 20


@settings(max_examples=200, deadline=None)
@given(
    members=st.integers(2, 12),
    samples=st.integers(1, 100),
    magnitude=st.floats(-4, 2.5),
    seed=st.integers(0, 2**32),
)
def test_few_steps_do_for_members_of_any_kind(members, samples, magnitude, seed):
    rng = np.random.default_rng(seed)
    logits_KNC = 10**magnitude * rng.normal(size=(members, samples, 3))
    labels_N = rng.integers(3, size=samples)
    _, gap, path = ExpectationMaximization().minimum(MixtureNLL(logits_KNC, labels_N))
    assert gap <= 1e-12
    assert len(path) <= 30


@pytest.mark.parametrize("wrong", [{"tolerance": 0.0}, {"iterations": 0}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ExpectationMaximization(**wrong)
