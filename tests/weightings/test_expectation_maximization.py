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
    assert found.gap <= 1e-9
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
    best = ExpectationMaximization(tolerance=1e-12).minimum(nll)[0]
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


@pytest.mark.parametrize("wrong", [{"tolerance": 0.0}, {"iterations": 0}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ConfigError):
        ExpectationMaximization(**wrong)
