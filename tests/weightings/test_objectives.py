import tracemalloc
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd.weightings.error_rate import ErrorRate
from kd.weightings.objectives import (
    Measure,
    Mixing,
    MixtureNLL,
    TieBrokenErrors,
    below_an_error,
    log_probs,
    mixed_log_probs,
    objective_on,
    temperature_of,
)
from kd.weightings.simplex import from_cube
from tests.reference_weightings import random_logits, score


def candidates(count: int, members: int, seed: int = 0) -> np.ndarray:
    """Random weights, sparse ones and corners."""
    weights_PK = from_cube(np.random.default_rng(seed).random((count, members)))
    weights_PK[::3, 0] *= members == 1
    weights_PK /= weights_PK.sum(axis=1, keepdims=True)
    return np.concatenate([weights_PK, np.eye(members)])


@pytest.mark.parametrize("samples", [5, 43])  # NLLs are summed by eights, and then the rest
@pytest.mark.parametrize("mixing", get_args(Mixing))
@pytest.mark.parametrize("measure", get_args(Measure))
def test_every_objective_equals_plain_loops(measure, mixing, samples):
    logits_KNC, labels_N = random_logits(4, samples, 5)
    weights_PK = candidates(6, 4)
    values_P = objective_on(logits_KNC, labels_N, measure, mixing)(weights_PK)
    for weights, value in zip(weights_PK, values_P, strict=True):
        expected = score(weights, logits_KNC, labels_N, measure, mixing)
        if measure == "accuracy":  # and the tie-break, which is less than one error
            assert expected <= value < expected + 1 / samples
        else:
            assert value == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("mixing", get_args(Mixing))
@pytest.mark.parametrize("measure", get_args(Measure))
def test_a_temperature_column_divides_all_logits(measure, mixing):
    logits_KNC, labels_N = random_logits(3, 30, 4)
    for unit in (0.0, 0.5, 0.8):
        point = np.array([[0.5, 0.2, 0.3, unit]])
        value = objective_on(logits_KNC, labels_N, measure, mixing, temperature=True)(point)[0]
        given = ([0.5, 0.2, 0.3], logits_KNC, labels_N, measure, mixing)
        expected = score(*given, temperature=temperature_of(unit))
        slack = 1 / 30 if measure == "accuracy" else 0
        assert expected - 1e-12 <= value <= expected * (1 + 1e-9) + slack


@pytest.mark.parametrize("mixing", get_args(Mixing))
@pytest.mark.parametrize("measure", get_args(Measure))
def test_a_column_that_stands_for_temperature_1_changes_nothing(measure, mixing):
    """Ties included, which go to the smaller NLL with a temperature as well."""
    given = *random_logits(3, 30, 4), measure, mixing
    weights_PK = candidates(20, 3)
    with_column_PD = np.column_stack([weights_PK, np.full(len(weights_PK), 0.5)])
    found_P = objective_on(*given, temperature=True)(with_column_PD)
    np.testing.assert_allclose(found_P, objective_on(*given)(weights_PK), rtol=1e-9)


def test_temperatures_span_an_eighth_to_eight():
    assert [temperature_of(u) for u in (0, 0.5, 1)] == pytest.approx([1 / 8, 1, 8])


@settings(max_examples=40, deadline=None)
@given(
    members=st.integers(1, 6),
    classes=st.integers(1, 30),
    samples=st.integers(1, 60),
    seed=st.integers(0, 2**32),
    coarse=st.booleans(),
)
def test_pruned_rivals_never_change_a_single_sample(members, classes, samples, seed, coarse):
    logits_KNC, labels_N = random_logits(members, samples, classes, seed)
    scores_KNC = np.exp(log_probs(logits_KNC))
    weights_PK = candidates(30, members, seed)
    if coarse:  # dyadic scores and weights: sums are exact, so ties are real ties
        scores_KNC = np.round(scores_KNC * 8) / 8
        weights_PK = np.round(weights_PK * 16) / 16
    mixed_PNC = np.tensordot(weights_PK, scores_KNC, axes=1)
    wrong_PN = mixed_PNC.argmax(axis=2) != labels_N
    np.testing.assert_array_equal(
        ErrorRate(scores_KNC, labels_N)(weights_PK), wrong_PN.mean(axis=1)
    )


def test_pruning_is_exact_over_chunks_and_removes_most_rivals():
    logits_KNC, labels_N = random_logits(5, 6000, 20, spread=1.0)
    errors = ErrorRate(logits_KNC, labels_N)
    weights_PK = candidates(50, 5)
    mixed_PNC = np.tensordot(weights_PK, logits_KNC.astype(float), axes=1)
    expected_P = (mixed_PNC.argmax(axis=2) != labels_N).mean(axis=1)
    np.testing.assert_array_equal(errors(weights_PK), expected_P)
    assert len(errors.blocks) > 1
    assert sum(sum(block.widths) for block in errors.blocks) < 0.2 * 6000 * 20


def test_what_float32_cannot_tell_is_counted_in_float64():
    """Margins of the even mixture: -1e-10, 0 and 1e-10, for a rival that does not win ties."""
    scores_KNC = np.zeros((2, 3, 2))
    scores_KNC[0, :, 1] = 1.0
    scores_KNC[1, :, 0] = 1.0 + 2e-10 * np.array([-1.0, 0.0, 1.0])
    weights_PK = np.array([[0.5, 0.5], [0.25, 0.75], [0.75, 0.25], [1, 0]])
    for label, wrong in ((0, [1, 0, 3, 3]), (1, [2, 3, 0, 0])):
        errors = ErrorRate(scores_KNC, np.full(3, label))
        np.testing.assert_array_equal(errors(weights_PK), np.array(wrong) / 3)


def test_ties_between_equally_wrong_candidates_go_to_the_smaller_nll():
    logits_KNC, labels_N = random_logits(3, 50, 4)
    objective = objective_on(logits_KNC, labels_N, "accuracy")
    assert isinstance(objective, TieBrokenErrors)
    weights_PK = candidates(200, 3)
    errors_P, nll_P = objective.errors(weights_PK), objective.nll(weights_PK)
    values_P = objective(weights_PK)
    for first, second in zip(range(199), range(1, 200), strict=True):
        if errors_P[first] != errors_P[second]:
            fewer = errors_P[first] < errors_P[second]
            assert (values_P[first] < values_P[second]) == fewer
        else:
            assert (values_P[first] < values_P[second]) == (nll_P[first] < nll_P[second])


@pytest.mark.parametrize("temperature", [False, True])
def test_members_that_are_certain_of_every_label_are_all_the_best(temperature):
    points_PD = np.array([[0.5, 0.5, 0.5], [1.0, 0.0, 0.5]])
    certain_KNC = 1e4 * np.tile(np.eye(3), (2, 1, 1))
    objective = objective_on(certain_KNC, np.arange(3), "accuracy", temperature=temperature)
    np.testing.assert_array_equal(objective(points_PD if temperature else points_PD[:, :2]), 0)


def test_the_tie_break_grows_with_the_nll_and_stays_below_an_error():
    bent = below_an_error(np.array([0.0, 0.5, 1.0, 2.0, np.inf]))
    np.testing.assert_allclose(bent, [0, 0.5, 1, 1.05, 1.1])


def test_nll_survives_members_that_give_a_label_no_chance():
    """Products of eight such likelihoods underflow; their logarithms must not."""
    logits_KNC, labels_N = random_logits(2, 20, 3)
    logits_KNC[1] = -3000 * np.eye(3)[labels_N]
    shares = [0.5, 1e-3, 1e-8, 1e-40]
    values = MixtureNLL(logits_KNC, labels_N)(np.array([[w, 1 - w] for w in shares]))
    alone = score([1, 0], logits_KNC, labels_N, "nll", "probabilities")
    np.testing.assert_allclose(values, [alone - np.log(w) for w in shares], rtol=1e-9)


def test_nll_survives_a_sample_whose_label_no_member_gives_a_chance():
    logits_KNC, labels_N = random_logits(2, 20, 3)
    logits_KNC[:, 0] = [-3000.0 * (c == labels_N[0]) for c in range(3)]
    logits_KNC[1, 0, labels_N[0]] = -2999.0
    value = MixtureNLL(logits_KNC, labels_N)(np.array([[0.5, 0.5]]))
    rest = score([0.5, 0.5], logits_KNC[:, 1:], labels_N[1:], "nll", "probabilities")
    lost = 2999 + np.log(2) - np.log(0.5 + 0.5 * np.exp(-1))
    np.testing.assert_allclose(value, [(19 * rest + lost) / 20], rtol=1e-9)


def test_mixed_log_probs_are_probabilities():
    logits_KNC, _ = random_logits(3, 20, 4)
    logits_KNC += 1e3 * np.arange(20)[:, None]  # a level of its own per sample, which cancels
    for mixing in get_args(Mixing):
        mixed_NC = mixed_log_probs(np.array([0.2, 0.3, 0.5]), logits_KNC, mixing, 2.0)
        np.testing.assert_allclose(np.exp(mixed_NC).sum(axis=1), 1)


def test_a_sample_with_hundreds_of_rivals_does_not_widen_all_others():
    """Members that were barely trained; with 1000 classes, it took 4 GiB."""
    rng = np.random.default_rng(0)
    labels_N = rng.integers(300, size=500)
    logits_KNC = rng.normal(size=(3, 500, 300))
    logits_KNC[:, np.arange(500), labels_N] += 3.0
    tracemalloc.start()
    objective = ErrorRate(logits_KNC, labels_N)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * logits_KNC.nbytes
    weights_PK = from_cube(rng.random((4, 3)))
    expected = [score(w, logits_KNC, labels_N, "accuracy", "logits") for w in weights_PK]
    np.testing.assert_allclose(objective(weights_PK), expected)
