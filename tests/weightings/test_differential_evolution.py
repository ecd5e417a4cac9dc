import dataclasses
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import get_args

import numpy as np
import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from kd.component import ConfigError
from kd.weightings import DifferentialEvolution, ExpectationMaximization
from kd.weightings.accuracy_guard import held_out_contest
from kd.weightings.evolution import Strategy
from kd.weightings.objectives import Measure, Mixing, MixtureNLL, objective_on
from kd.weightings.shrinkage import SHARES, folds, shrinkage_by_cross_validation
from tests.checks_weightings import names
from tests.reference_weightings import random_logits


@pytest.mark.parametrize("members", [2, 3, 5, 10])
def test_the_search_reaches_the_certified_optimum(members):
    logits_KNC, labels_N = random_logits(members, 300, 6, spread=1.5)
    given = logits_KNC, labels_N, names(members), 0
    found = DifferentialEvolution(shrink=False).find(*given)
    exact = ExpectationMaximization().find(*given)
    assert exact.gap <= 1e-9
    assert abs(found.objective - exact.objective) <= 1e-6
    assert found.gap <= 1e-6


@pytest.mark.parametrize("tolerance", [1e-9, 1e-3])
@pytest.mark.parametrize("strategy", get_args(Strategy))
def test_with_and_without_a_study_the_steps_are_the_same_bit_for_bit(strategy, tolerance):
    given = *random_logits(3, 100, 4), names(3), 7
    through = DifferentialEvolution(strategy=strategy, generations=20, tolerance=tolerance)
    without = dataclasses.replace(through, study=False)
    first, second = through.find(*given), without.find(*given)
    np.testing.assert_array_equal(first.history.tried_MK, second.history.tried_MK)
    np.testing.assert_array_equal(first.history.values_M, second.history.values_M)
    np.testing.assert_array_equal(first.weights_K, second.weights_K)


@pytest.mark.parametrize("mixing", get_args(Mixing))
@pytest.mark.parametrize("measure", get_args(Measure))
@pytest.mark.parametrize("temperature", [False, True])
def test_every_objective_can_be_searched_and_beats_uniform(measure, mixing, temperature):
    logits_KNC, labels_N = random_logits(3, 80, 4)
    weighting = DifferentialEvolution(
        objective=measure,
        mixing=mixing,
        fit_temperature=temperature,
        shrink=False,
        study=False,
        generations=15,
    )
    found = weighting.find(logits_KNC, labels_N, names(3), 0)
    uniform = np.array([[1 / 3] * 3 + [0.5] * temperature])
    objective = objective_on(logits_KNC, labels_N, measure, mixing, temperature=temperature)
    assert found.objective < objective(uniform)[0]
    assert (found.temperature is not None) == temperature


def test_a_temperature_is_found_where_members_are_too_sure():
    logits_KNC, labels_N = random_logits(3, 300, 4)
    sure = DifferentialEvolution(fit_temperature=True, shrink=False, generations=30)
    plain = sure.find(logits_KNC, labels_N, names(3), 0)
    found = sure.find(4 * logits_KNC, labels_N, names(3), 0)
    assert found.temperature == pytest.approx(4 * plain.temperature, rel=0.02)
    assert found.objective == pytest.approx(plain.objective, abs=1e-4)


def test_a_lone_member_has_a_temperature_to_be_found_and_no_weights():
    logits_KNC, labels_N = random_logits(1, 300, 4)
    given = 4 * logits_KNC, labels_N, names(1), 0
    alone = DifferentialEvolution(fit_temperature=True, shrink=False, generations=30).find(*given)
    at_1 = DifferentialEvolution(shrink=False).find(*given)
    assert (alone.weights, at_1.weights) == ({"a": 1.0}, {"a": 1.0})
    assert alone.objective < at_1.objective
    assert (at_1.evaluations, at_1.temperature) == (1, None)


@pytest.mark.parametrize("study", [False, True])
def test_a_member_may_be_named_temperature(study):
    logits_KNC, labels_N = random_logits(2, 100, 4)
    joint = DifferentialEvolution(fit_temperature=True, shrink=False, study=study, generations=3)
    found = joint.find(logits_KNC, labels_N, ("a", "temperature"), 0)
    same = joint.find(logits_KNC, labels_N, ("a", "b"), 0)
    assert list(found.weights.values()) == list(same.weights.values())
    assert found.temperature == same.temperature


def test_shrinkage_is_the_share_that_held_out_samples_prefer():
    logits_KNC, labels_N = random_logits(3, 100, 4)
    found = DifferentialEvolution(study=False).find(logits_KNC, labels_N, names(3), 0)
    assert found.shrinkage in SHARES
    np.testing.assert_allclose(
        found.weights_K, (1 - found.shrinkage) * found.searched_K + found.shrinkage / 3
    )
    kept = DifferentialEvolution(study=False, shrink=False).find(logits_KNC, labels_N, names(3), 0)
    assert kept.shrinkage is None
    np.testing.assert_array_equal(kept.weights_K, found.searched_K)


def test_held_out_samples_see_through_weights_that_only_fit_noise():
    """All weight on one member of equals: held out, uniform is best; of unequals, it is worst."""
    logits_KNC, labels_N = random_logits(4, 400, 4)
    on = lambda rows: MixtureNLL(logits_KNC[:, rows], labels_N[rows])  # noqa: E731
    one = lambda rows: np.array([1.0, 0, 0, 0])  # noqa: E731
    assert shrinkage_by_cross_validation(one, on, labels_N, 4, 0) >= 0.5
    logits_KNC[1:] = -9 * np.eye(4)[labels_N]
    assert shrinkage_by_cross_validation(one, on, labels_N, 4, 0) == 0


def timid_but_right(samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Member a is right 9 times of 10 and never sure; b and c are sure, and right 6 times."""
    rng = np.random.default_rng(0)
    labels_N = rng.integers(4, size=samples)

    def member(right, sure):
        guess_N = np.where(rng.random(samples) < right, labels_N, (labels_N + 1) % 4)
        return np.log(np.where(np.eye(4)[guess_N] == 1, sure, (1 - sure) / 3))

    return np.stack([member(0.9, 0.3), member(0.6, 0.8), member(0.6, 0.8)]), labels_N


def test_accuracy_that_holds_on_held_out_samples_keeps_the_average_of_the_folds():
    logits_KNC, labels_N = timid_but_right(400)
    weighting = DifferentialEvolution(objective="accuracy", study=False, generations=15)
    found = weighting.find(logits_KNC, labels_N, names(3), 0)
    searched = [
        dataclasses.replace(weighting, shrink=False).find(
            logits_KNC[:, fitted], labels_N[fitted], names(3), 0
        )
        for fitted, _ in folds(labels_N, 0)
    ]
    np.testing.assert_allclose(found.weights_K, np.mean([f.weights_K for f in searched], axis=0))
    assert found.shrinkage is None
    assert found.warnings == ()
    nll = dataclasses.replace(weighting, objective="nll").find(logits_KNC, labels_N, names(3), 0)
    objective = objective_on(logits_KNC, labels_N, "accuracy")
    assert found.objective < objective(nll.weights_K[None])[0] - 0.1


@pytest.mark.parametrize(("temperature", "generations"), [(False, 40), (True, 8)])
def test_accuracy_that_does_not_gives_way_to_the_weights_of_the_least_nll(
    temperature, generations
):
    logits_KNC, _ = random_logits(2, 200, 4)
    labels_N = np.random.default_rng(2).integers(4, size=200)
    weighting = DifferentialEvolution(
        objective="accuracy", fit_temperature=temperature, study=False, generations=generations
    )
    given = logits_KNC, labels_N, names(2), 0
    found = weighting.find(*given)
    nll = dataclasses.replace(weighting, objective="nll").find(*given)
    assert found.shrinkage == nll.shrinkage
    assert found.temperature == nll.temperature
    np.testing.assert_allclose(found.weights_K, nll.weights_K, atol=1e-4)
    assert len(found.warnings) == 1
    assert "those of the least NLL" in found.warnings[0]


def test_a_contest_is_fought_on_samples_that_neither_side_has_seen():
    labels_N = np.repeat([0, 1], 50)
    seen = []

    def fit(samples):
        seen.append(set(samples.tolist()))
        return np.array([1.0, 0.0]) if len(seen) % 2 else np.array([0.0, 1.0])

    def is_right(point_D, samples):
        assert not seen[-1] & set(samples.tolist())
        return samples % 4 != 0 if point_D[0] else samples % 2 == 0

    def rival_fit(samples):
        assert set(samples.tolist()) == seen[-1]
        return np.array([0.5, 0.5])

    contest = held_out_contest(fit, rival_fit, is_right, labels_N, 0)
    np.testing.assert_allclose(contest.mean_D, [0.6, 0.4])
    assert set.union(*(set(range(100)) - each for each in seen)) == set(range(100))
    # The rival is right on the samples not divisible by 4, as is whoever returns [1, 0].
    odd = sorted(set(range(100)) - seen[1]) + sorted(set(range(100)) - seen[3])
    gains_N = np.zeros(100)
    gains_N[odd] = [(n % 2 == 0) * 1.0 - (n % 4 != 0) for n in odd]
    assert contest.gain == pytest.approx(gains_N.mean())
    assert contest.error == pytest.approx(gains_N.std(ddof=1) / 10)
    assert not contest.is_won


@pytest.mark.parametrize(
    ("gained", "lost", "won"), [(1, 0, False), (2, 0, True), (3, 1, False), (4, 1, True)]
)
def test_a_contest_is_decided_alike_for_every_number_of_samples(gained, lost, won):
    def is_right(point_D, samples):
        ours, theirs = samples < gained, (samples >= gained) & (samples < gained + lost)
        return ours if point_D[0] else theirs

    for num_samples in range(5, 1000):
        contest = held_out_contest(
            lambda _: np.array([1.0, 0.0]),
            lambda _: np.array([0.0, 1.0]),
            is_right,
            np.zeros(num_samples, dtype=np.int64),
            0,
        )
        assert contest.is_won == won, num_samples


def test_the_study_is_a_journal_that_optuna_opens(tmp_path):
    given = *random_logits(3, 100, 4), names(3), 0
    path = tmp_path / "study.log"
    found = DifferentialEvolution(generations=10).find(*given, study_path=path)
    storage = JournalStorage(JournalFileBackend(str(path)))
    [name] = optuna.get_all_study_names(storage)
    study = optuna.load_study(study_name=name, storage=storage)
    assert len(study.trials) == found.evaluations == 200
    assert list(study.best_params) == ["a", "b", "c"]
    assert study.best_value == found.history.best_G[-1]


@pytest.mark.slow
def test_optuna_dashboard_shows_the_study(tmp_path):
    pytest.importorskip("optuna_dashboard")
    path = tmp_path / "study.log"
    given = *random_logits(3, 100, 4), names(3), 0
    DifferentialEvolution(generations=10).find(*given, study_path=path)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("optuna-dashboard"), path, "--port", str(port)]
    dashboard = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        [study] = _answer(f"http://127.0.0.1:{port}/api/studies")["study_summaries"]
        url = f"http://127.0.0.1:{port}/api/studies/{study['study_id']}"
        assert len(_answer(url)["trials"]) == 200
    finally:
        dashboard.terminate()
        dashboard.wait()


def _answer(url: str) -> dict:
    """What the server says, once it is up."""
    for _ in range(120):
        try:
            with urllib.request.urlopen(url) as answer:
                return json.load(answer)
        except urllib.error.URLError:
            time.sleep(0.5)
    raise TimeoutError(url)


@pytest.mark.parametrize(("generations", "tolerance"), [(10, 0.0), (500, 1e-3)])
def test_a_study_cut_short_is_resumed_to_the_same_weights_and_a_finished_one_is_read(
    generations, tolerance, tmp_path
):
    given = *random_logits(3, 100, 4), names(3), 0
    weighting = DifferentialEvolution(generations=generations, tolerance=tolerance)
    whole = weighting.find(*given, study_path=tmp_path / "whole")
    assert (whole.evaluations < 20 * generations) == (tolerance > 0)  # it converges
    lines = (tmp_path / "whole").read_bytes().splitlines(keepends=True)
    (tmp_path / "cut").write_bytes(b"".join(lines[:343])[:-9])
    resumed = weighting.find(*given, study_path=tmp_path / "cut")
    np.testing.assert_array_equal(resumed.searched_K, whole.searched_K)
    again = weighting.find(*given, study_path=tmp_path / "whole")
    np.testing.assert_array_equal(again.weights_K, whole.weights_K)
    lines_now = (tmp_path / "whole").read_bytes().splitlines()
    assert len(lines_now) <= len(lines) + 1  # "create the study, if there is none"


def test_other_logits_or_another_seed_never_resume_a_study(tmp_path):
    weighting = DifferentialEvolution(generations=4)
    path = tmp_path / "study"
    for seed, data in ((0, 0), (1, 0), (0, 1)):
        weighting.find(*random_logits(3, 100, 4, data), names(3), seed, study_path=path)
    storage = JournalStorage(JournalFileBackend(str(path)))
    assert len(optuna.get_all_study_names(storage)) == 3


def test_the_seed_decides_the_search():
    given = *random_logits(3, 100, 4), names(3)
    weighting = DifferentialEvolution(study=False, generations=5)
    first, other = (weighting.find(*given, seed).history.tried_MK for seed in (0, 1))
    assert (first != other).any()


def test_optunas_verbosity_is_as_it_was():
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    DifferentialEvolution(generations=2).find(*random_logits(3, 50, 4), names(3), 0)
    assert optuna.logging.get_verbosity() == optuna.logging.ERROR


@pytest.mark.parametrize("wrong", [{"population": 3}, {"generations": 0}, {"tolerance": -1.0}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        DifferentialEvolution(**wrong)


def test_optuna_is_imported_only_when_a_study_is_searched():
    code = """
import sys
import kd.weightings
assert "optuna" not in sys.modules and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
