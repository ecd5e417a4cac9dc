import dataclasses
from typing import get_args

import numpy as np
import pytest

from kd.component import ConfigError
from kd.weightings import (
    BestSingle,
    DifferentialEvolution,
    ExpectationMaximization,
    Fixed,
    Greedy,
    Uniform,
    Weighting,
    cross_fitted,
    weight_record,
)
from kd.weightings.objectives import objective_on
from tests import checks_weightings
from tests.checks_weightings import names
from tests.reference_weightings import random_logits, score

NEEDED = {Fixed: {"weights": {"a": 1.0, "b": 3.0, "c": 0.0}}}
FAMILY = [member(**NEEDED.get(member, {})) for member in get_args(Weighting)]
CHECKS = [name for name in sorted(vars(checks_weightings)) if name.startswith("check_")]


@pytest.mark.parametrize("check", [c for c in CHECKS if c != "check_weighting"])
@pytest.mark.parametrize("weighting", FAMILY, ids=lambda weighting: weighting.kind)
def test_every_weighting_passes_the_battery(weighting, check):
    getattr(checks_weightings, check)(weighting)


def test_the_battery_runs_on_an_outsiders_class_by_one_line():
    @dataclasses.dataclass(frozen=True)
    class Outside:
        kind: str = "outside"

        def find(self, logits_KNC, labels_N, names, seed, study_path=None):
            return Uniform().find(logits_KNC, labels_N, names, seed)

    checks_weightings.check_weighting(Outside())


def test_the_battery_notices_weights_off_the_simplex():
    class Broken(Uniform):
        def find(self, *given, **kw):
            found = super().find(*given, **kw)
            return dataclasses.replace(found, weights_K=found.weights_K * 1.01)

    with pytest.raises(AssertionError, match="Broken fails check_"):
        checks_weightings.check_weighting(Broken())


def test_best_single_is_the_most_accurate_member_and_breaks_ties_by_nll():
    logits_KNC, labels_N = random_logits(4, 80, 3)
    singles = np.eye(4)
    scores = [
        (
            score(w, logits_KNC, labels_N, "accuracy", "probabilities"),
            score(w, logits_KNC, labels_N, "nll", "probabilities"),
        )
        for w in singles
    ]
    found = BestSingle().find(logits_KNC, labels_N, names(4), 0)
    assert found.weights_K.tolist() == singles[scores.index(min(scores))].tolist()
    tied = np.stack([logits_KNC[0], 0.5 * logits_KNC[0], 1.5 * logits_KNC[0]])
    nlls = [score(w, tied, labels_N, "nll", "probabilities") for w in np.eye(3)]
    found = BestSingle().find(tied, labels_N, names(3), 0)
    assert found.weights_K.argmax() == nlls.index(min(nlls))


def test_best_single_breaks_ties_by_nll_though_all_together_beat_each():
    """Each is wrong where the other is right, and the second is less sure of it."""
    right = np.array([[2.0, 0.0], [0.0, 2.0]])
    logits_KNC = np.stack([1.5 * right, right[:, ::-1]])
    logits_KNC[0, 1], logits_KNC[1, 1] = 1.5 * right[1, ::-1], right[1]
    labels_N = np.array([0, 1])
    nlls = [score(w, logits_KNC, labels_N, "nll", "probabilities") for w in np.eye(2)]
    together = score([0.5, 0.5], logits_KNC, labels_N, "nll", "probabilities")
    assert together < nlls[1] < nlls[0]
    assert BestSingle().find(logits_KNC, labels_N, names(2), 0).weights_K.tolist() == [0, 1]


def test_fixed_weights_are_normalised_and_keep_the_members_order():
    logits_KNC, labels_N = random_logits(3, 30, 3)
    found = Fixed(weights={"c": 1.0, "a": 3.0, "b": 0.0}).find(logits_KNC, labels_N, names(3), 0)
    assert found.weights == {"a": 0.75, "b": 0.0, "c": 0.25}


@pytest.mark.parametrize(
    "weights", [{"a": -1.0, "b": 2.0}, {"a": 0.0}, {"a": float("nan")}, {}, {"a": float("inf")}]
)
def test_fixed_refuses_weights_that_are_no_weights(weights):
    with pytest.raises(ConfigError, match="weights is"):
        Fixed(weights=weights)


def test_fixed_names_the_members_it_does_not_know():
    logits_KNC, labels_N = random_logits(2, 30, 3)
    with pytest.raises(ConfigError, match=r"weights name \['a', 'z'\]; the members are \['a'"):
        Fixed(weights={"a": 1.0, "z": 1.0}).find(logits_KNC, labels_N, names(2), 0)


def test_greedy_takes_the_member_that_helps_most_at_every_step():
    logits_KNC, labels_N = random_logits(3, 60, 3)
    counts = np.zeros(3)
    trail = []
    for _ in range(12):
        options = [(counts + one) / (counts.sum() + 1) for one in np.eye(3)]
        nlls = [score(w, logits_KNC, labels_N, "nll", "probabilities") for w in options]
        counts[nlls.index(min(nlls))] += 1
        trail.append((min(nlls), counts / counts.sum()))
    found = Greedy(steps=12).find(logits_KNC, labels_N, names(3), 0)
    nll, weights = min(trail, key=lambda pair: pair[0])
    np.testing.assert_allclose(found.weights_K, weights)
    assert found.objective == pytest.approx(nll, rel=1e-6)
    assert found.evaluations == 36


def test_uniform_reports_the_nll_of_the_plain_average():
    logits_KNC, labels_N = random_logits(3, 40, 4)
    found = Uniform().find(logits_KNC, labels_N, names(3), 0)
    expected = score([1 / 3] * 3, logits_KNC, labels_N, "nll", "probabilities")
    assert found.objective == pytest.approx(expected, rel=1e-9)


def test_few_samples_per_member_are_warned_of():
    few, enough = random_logits(3, 299, 4), random_logits(3, 300, 4)
    for searching in (Greedy(steps=2), ExpectationMaximization(), DifferentialEvolution()):
        assert "299 validation samples" in searching.find(*few, names(3), 0).warnings[0]
        assert not searching.find(*enough, names(3), 0).warnings


def test_held_out_scores_never_come_from_weights_that_saw_the_sample():
    logits_KNC, labels_N = random_logits(3, 50, 3)
    seen = []

    class Spy(Uniform):
        def find(self, logits_KNC, labels_N, names, seed, study_path=None):
            seen.append({row.tobytes() for row in logits_KNC[0]})
            return super().find(logits_KNC, labels_N, names, seed)

    cross_fitted(Spy(), logits_KNC, labels_N, names(3), 0)
    everything = {row.tobytes() for row in logits_KNC[0]}
    held_out = [everything - fitted for fitted in seen]
    assert [len(rows) for rows in held_out] == [10] * 5
    assert set.union(*held_out) == everything


def test_the_record_gains_are_paired_means_with_their_standard_errors():
    logits_KNC, labels_N = random_logits(3, 120, 4)
    weighting = ExpectationMaximization()
    found = weighting.find(logits_KNC, labels_N, names(3), 0)
    record = weight_record(weighting, found, logits_KNC, labels_N, 0)
    chosen = cross_fitted(weighting, logits_KNC, labels_N, names(3), 0)
    single = cross_fitted(BestSingle(), logits_KNC, labels_N, names(3), 0)
    gain = record["gain"]["over_best_single"]
    difference = single.nll_N - chosen.nll_N
    assert gain["nll"] == pytest.approx(difference.mean())
    assert gain["nll_se"] == pytest.approx(difference.std(ddof=1) / np.sqrt(120))
    assert gain["accuracy"] == pytest.approx(chosen.right_N.mean() - single.right_N.mean())
    assert record["num_val"] == 120
    assert record["weighting"] == {
        "kind": "expectation_maximization",
        "tolerance": 1e-12,
        "iterations": 100,
    }
    assert set(record["sets"]["chosen"]) == {
        "weights",
        "val_nll",
        "val_accuracy",
        "held_out_nll",
        "held_out_accuracy",
        "evaluations",
        "gap",
    }


def test_the_record_scores_logit_averages_as_logit_averages():
    logits_KNC, labels_N = random_logits(3, 60, 4)
    weighting = Greedy(mixing="logits", steps=5)
    found = weighting.find(logits_KNC, labels_N, names(3), 0)
    record = weight_record(weighting, found, logits_KNC, labels_N, 0)
    expected = score(found.weights_K, logits_KNC, labels_N, "nll", "logits")
    assert record["sets"]["chosen"]["val_nll"] == pytest.approx(expected, rel=1e-6)


def test_too_few_samples_for_five_folds_say_so():
    logits_KNC, labels_N = random_logits(3, 4, 2)
    with pytest.raises(ConfigError, match="needs at least 5"):
        cross_fitted(Uniform(), logits_KNC, labels_N, names(3), 0)


def test_classes_are_dealt_evenly_to_the_folds():
    from kd.weightings.shrinkage import folds

    labels_N = np.repeat([0, 1, 2], [50, 25, 10])
    dealt = []
    for fitted, held_out in folds(labels_N, 3):
        assert np.bincount(labels_N[held_out]).tolist() == [10, 5, 2]
        assert sorted([*fitted, *held_out]) == list(range(85))
        dealt += [*held_out]
    assert sorted(dealt) == list(range(85))


def test_every_objective_of_the_best_weights_is_what_found_says():
    logits_KNC, labels_N = random_logits(3, 60, 4)
    found = DifferentialEvolution(objective="brier").find(logits_KNC, labels_N, names(3), 0)
    assert found.objective == objective_on(logits_KNC, labels_N, "brier")(found.weights_K[None])[0]
