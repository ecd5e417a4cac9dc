"""What every weighting must do; one line checks your own:

    check_weighting(MyWeighting())

It is given the members `a`, `b`, ... (see `names`).
"""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from kd.component import ConfigError
from kd.weightings import cross_fitted, weight_record
from tests.reference_weightings import random_logits

SETS = {"chosen", "uniform", "best_single", "expectation_maximization"}


def check_weighting(weighting: Any) -> None:
    """Run the whole battery on one weighting."""
    for name, check in sorted(globals().items()):
        if name.startswith("check_") and name != "check_weighting":
            try:
                check(weighting)
            except AssertionError as error:
                said = f"{type(weighting).__name__} fails {name} ({error})"
                raise AssertionError(said) from error


def names(count: int) -> tuple[str, ...]:
    return tuple("abcdefghij"[:count])


def find(weighting: Any, logits_KNC: np.ndarray, labels_N: np.ndarray, seed: int = 0) -> Any:
    """The weights of the weighting, which must be on the simplex."""
    found = weighting.find(logits_KNC, labels_N, names(len(logits_KNC)), seed)
    assert found.names == names(len(logits_KNC))
    assert found.weights_K.dtype == np.float64
    assert found.weights_K.shape == (len(logits_KNC),)
    assert (found.weights_K >= 0).all()
    assert found.weights_K.sum() == pytest.approx(1, abs=1e-12)
    assert np.isfinite(found.objective)
    return found


def check_is_a_frozen_component_that_compares_by_value(weighting: Any) -> None:
    assert dataclasses.replace(weighting) == weighting
    with pytest.raises(dataclasses.FrozenInstanceError):
        weighting.kind = "another"


def check_is_deterministic_given_the_seed(weighting: Any) -> None:
    given = random_logits(3, 60, 4)
    first, second = find(weighting, *given), find(weighting, *given)
    np.testing.assert_array_equal(first.weights_K, second.weights_K)
    assert first.objective == second.objective


def check_leaves_its_input_alone(weighting: Any) -> None:
    logits_KNC, labels_N = random_logits(3, 60, 4)
    before = logits_KNC.copy(), labels_N.copy()
    find(weighting, logits_KNC, labels_N)
    np.testing.assert_array_equal(logits_KNC, before[0])
    np.testing.assert_array_equal(labels_N, before[1])


def check_history_is_a_history(weighting: Any) -> None:
    history = find(weighting, *random_logits(3, 60, 4)).history
    assert (np.diff(history.evaluations_G) > 0).all()
    assert (history.best_G <= history.median_G).all()
    assert (history.median_G <= history.worst_G).all()
    assert history.weights_GK.shape == (len(history.best_G), 3)
    np.testing.assert_allclose(history.weights_GK.sum(axis=1), 1)
    assert len(history.tried_MK) == len(history.values_M)
    assert history.best_G[-1] == np.nanmin(history.values_M)


def check_a_lone_member_gets_everything(weighting: Any) -> None:
    if weighting.kind == "fixed":
        return  # its weights name three members
    logits_KNC, labels_N = random_logits(1, 60, 4)
    assert find(weighting, logits_KNC, labels_N).weights == {"a": 1.0}


def check_identical_members_never_give_nan(weighting: Any) -> None:
    logits_KNC, labels_N = random_logits(3, 60, 4)
    logits_KNC[:] = logits_KNC[0]
    weights_K = find(weighting, logits_KNC, labels_N).weights_K
    if weighting.kind not in ("best_single", "fixed"):
        np.testing.assert_allclose(weights_K, 1 / 3)


def check_certain_and_hopeless_members_never_give_nan(weighting: Any) -> None:
    """One member is sure and right, one is sure and wrong, by logits that underflow softmax."""
    logits_KNC, labels_N = random_logits(3, 60, 4)
    logits_KNC[0] = 2000 * np.eye(4)[labels_N]
    logits_KNC[1] = 2000 * np.eye(4)[(labels_N + 1) % 4]
    find(weighting, logits_KNC, labels_N)


def check_one_class_and_few_samples(weighting: Any) -> None:
    find(weighting, np.zeros((3, 6, 1), np.float32), np.zeros(6, np.int64))
    find(weighting, *random_logits(3, 6, 2))


def check_weights_beat_the_worst_member_alone(weighting: Any) -> None:
    logits_KNC, labels_N = random_logits(3, 200, 4)
    logits_KNC[0] *= -1
    found = find(weighting, logits_KNC, labels_N)
    assert found.weights_K[0] < 1


def check_bad_input_is_refused(weighting: Any) -> None:
    logits_KNC, labels_N = random_logits(3, 60, 4)
    abc = names(3)
    not_finite = logits_KNC.copy()
    not_finite[1, 5, 2] = np.nan
    wrong = {
        "member 'b' has 1 logits that are not finite": (not_finite, labels_N, abc),
        r"logits have shape \(3, 240\)": (logits_KNC.reshape(3, -1), labels_N, abc),
        r"labels \(59,\)": (logits_KNC, labels_N[:-1], abc),
        "label 4 of sample 7 is outside 0..3": (logits_KNC, _with(labels_N, 7, 4), abc),
        "label -1 of sample 0 is outside 0..3": (logits_KNC, _with(labels_N, 0, -1), abc),
        "labels are float64": (logits_KNC, labels_N.astype(float), abc),
        "3 different member names": (logits_KNC, labels_N, ("a", "b", "a")),
        "0 validation samples": (logits_KNC[:, :0], labels_N[:0], abc),
        "there are 0 members": (logits_KNC[:0], labels_N, ()),
        "logits_KNC is 'list'; it must be an array": (logits_KNC.tolist(), labels_N, abc),
        r"labels_N is 'Tensor \(60,\) torch.int64'": (logits_KNC, torch.tensor(labels_N), abc),
    }
    for message, (logits, labels, members) in wrong.items():
        with pytest.raises(ConfigError, match=message):
            weighting.find(logits, labels, members, 0)


def check_is_scored_on_samples_it_has_not_seen(weighting: Any) -> None:
    logits_KNC, labels_N = random_logits(3, 60, 4)
    held_out = cross_fitted(weighting, logits_KNC, labels_N, names(3), 0)
    assert np.isfinite(held_out.nll_N).all()
    found = find(weighting, logits_KNC, labels_N)
    record = weight_record(weighting, found, logits_KNC, labels_N, 0)
    assert set(record["sets"]) == SETS
    assert record["sets"]["chosen"]["held_out_nll"] == held_out.nll_N.mean()
    assert record["weights"] == found.weights == record["sets"]["chosen"]["weights"]


def _with(labels_N: np.ndarray, sample: int, label: int) -> np.ndarray:
    changed = labels_N.copy()
    changed[sample] = label
    return changed
