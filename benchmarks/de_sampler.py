"""The bars of DESampler and of the weightings, measured side by side in one run.

    python benchmarks/de_sampler.py            # everything, about a quarter of an hour
    python benchmarks/de_sampler.py --quick    # fewer trials and seeds: a smoke test, no record
    python benchmarks/de_sampler.py --bars 5 6 # some of them

Prints Markdown for benchmarks/RECORDS.md.  Every ratio is measured here, against peers in the
same process; CPU time where computing decides, wall time where fsync does.  Exit code 1 when a
bar does not hold.

Data: *digits* = scikit-learn's digits, 20 MLPs of 10 widths on bootstraps of 600 images, 500
validation images; *mc* = make_classification, 10 classes, 10 of 20 features informative, the same
on 3000 samples, 2000 for validation.  All else of the MLPs is scikit-learn's default.  The best
mixture of the 20 uses 2 of them on digits and 10 on mc.  For K < 20 every seed draws its own K.
The lead over scipy is one on sparse optima: with 12 informative features, where the best mixture
uses 13, the ratio at K = 10 is 0.61 and scipy solves 2 of 7 at K = 20; here it is 0.47, and none.

Shapes: P candidates, K members, N samples, C classes.
"""

import argparse
import importlib.util
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import cycle
from pathlib import Path
from types import ModuleType

import numpy as np
import optuna
import scipy
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.storages import InMemoryStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend

from kd.weightings import DifferentialEvolution, ExpectationMaximization, Uniform, weight_record
from kd.weightings.de_sampler import (
    DESampler,
    GenerationJournalBackend,
    PrefetchObjective,
    optimize_population,
)
from kd.weightings.error_rate import ErrorRate
from kd.weightings.evolution import Evolution, Rules, Strategy, default_population, minimise
from kd.weightings.objectives import MixtureNLL, log_probs
from kd.weightings.simplex import from_cube

ROOT = Path(__file__).parents[1]
NAMES = tuple(f"w{k}" for k in range(5))
SPACE: dict[str, BaseDistribution] = {name: FloatDistribution(0.0, 1.0) for name in NAMES}
TARGET = np.array([0.4, 0.3, 0.2, 0.1, 0.0])
STRATEGIES: tuple[Strategy, ...] = ("rand1", "best1", "current-to-best1", "jade", "shade")
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Row:
    """One measurement beside what it must be; without a bar it only informs."""

    bar: int
    what: str
    wanted: str
    measured: str
    holds: bool | None


def at_most(bar: int, what: str, value: float, limit: float, unit: str = "x") -> Row:
    """A row that holds when the value is small enough."""
    return Row(bar, what, f"<= {limit:g}{unit}", f"{value:.3g}{unit}", value <= limit)


def at_least(bar: int, what: str, value: float, limit: float, unit: str = "x") -> Row:
    """A row that holds when the value is large enough."""
    return Row(bar, what, f">= {limit:g}{unit}", f"{value:.3g}{unit}", value >= limit)


def info(bar: int, what: str, measured: str) -> Row:
    """A row that is no bar."""
    return Row(bar, what, "", measured, None)


def cpu(work: Callable[[], object]) -> float:
    """CPU seconds of this process."""
    started = time.process_time()
    work()
    return time.process_time() - started


def wall(work: Callable[[], object]) -> float:
    """Seconds on the clock."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def batch(rows_PK: np.ndarray) -> np.ndarray:
    """A bowl whose bottom is on a face of the simplex."""
    values_P: np.ndarray = ((rows_PK - TARGET) ** 2).sum(axis=1)
    return values_P


def single(trial: optuna.Trial) -> float:
    """The same, one trial at a time and in plain Python."""
    row = [trial.suggest_float(name, 0.0, 1.0) for name in NAMES]
    return float(sum((x - t) ** 2 for x, t in zip(row, TARGET.tolist(), strict=True)))


def de_sampler(size: int = 50, strategy: Strategy = "shade", seed: int = 0) -> DESampler:
    """Our sampler on the five weights."""
    return DESampler(SPACE, simplex=NAMES, population_size=size, strategy=strategy, seed=seed)


def study_with(
    sampler: optuna.samplers.BaseSampler, storage: optuna.storages.BaseStorage | str | None = None
) -> optuna.Study:
    """A fresh study, or the one that the storage holds."""
    return optuna.create_study(
        storage=storage, sampler=sampler, study_name="bench", load_if_exists=True
    )


# Data ------------------------------------------------------------------------------------------


@cache
def members_of(dataset: str) -> tuple[np.ndarray, np.ndarray]:
    """Logits (20, N, 10) and labels of what was not trained on."""
    from sklearn.datasets import load_digits, make_classification
    from sklearn.neural_network import MLPClassifier

    if dataset == "digits":
        samples, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(labels))
        samples, labels, trained = samples[order] / 16, labels[order], 600
    else:
        samples, labels = make_classification(
            25_000,
            20,
            n_informative=10,
            n_redundant=4,
            n_classes=10,
            class_sep=1.5,
            random_state=0,
        )
        trained = 3000
    widths = (8, 10, 12, 14, 16, 20, 24, 32, 48, 64)
    logits = []
    for member in range(20):
        drawn = np.random.default_rng([1, member]).integers(trained, size=trained)
        network = MLPClassifier((widths[member % 10],), random_state=member)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network.fit(samples[drawn], labels[drawn])
        logits.append(np.log(np.clip(network.predict_proba(samples[trained:]), 1e-12, None)))
    return np.array(logits), labels[trained:]


def validation(dataset: str) -> tuple[np.ndarray, np.ndarray]:
    """The first 500 (digits) or 2000 (mc) samples."""
    logits_KNC, labels_N = members_of(dataset)
    count = 500 if dataset == "digits" else 2000
    return logits_KNC[:, :count], labels_N[:count]


def some_members(dataset: str, members: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Validation logits of `members` of the 20, drawn by the seed."""
    logits_KNC, labels_N = validation(dataset)
    chosen = np.random.default_rng([2, seed]).choice(20, members, replace=False)
    return logits_KNC[np.sort(chosen)], labels_N


def simulated(classes: int, samples: int = 10_000) -> tuple[np.ndarray, np.ndarray]:
    """Correlated logits of five members."""
    rng = np.random.default_rng(classes)
    labels_N = rng.integers(classes, size=samples)
    shared_NC = rng.normal(size=(samples, classes))
    own_KNC = rng.normal(size=(5, samples, classes))
    signal = 2.0 if classes == 10 else 3.0  # about 80 % right in both
    logits_KNC = signal * np.eye(classes)[labels_N] + 0.8 * shared_NC + 0.6 * own_KNC
    return logits_KNC.astype(np.float32), labels_N


# Bars ------------------------------------------------------------------------------------------


def bar_1_and_2(quick: bool) -> Iterator[Row]:
    """What a trial costs in memory, and whether that grows."""
    trials, repeats = (1000, 1) if quick else (10_000, 7)
    spent: dict[str, list[float]] = {}
    blocks: list[list[float]] = []

    def run(name: str, sampler: optuna.samplers.BaseSampler) -> None:
        study = study_with(sampler)
        times = [time.process_time()]
        for _ in range(10):
            study.optimize(single, n_trials=trials // 10)
            times.append(time.process_time())
        spent.setdefault(name, []).append(times[-1] - times[0])
        if name == "shade":
            blocks.append(np.diff(times).tolist())

    for repeat in range(repeats):
        run("random", optuna.samplers.RandomSampler(seed=repeat))
        run("shade", de_sampler(seed=repeat))
        run("define-by-run", DESampler(population_size=50, seed=repeat))
        if isinstance(theirs := hub(), ModuleType):
            run("hub", theirs.DESampler(search_space=SPACE, population_size=50, seed=repeat))
    run("cma", optuna.samplers.CmaEsSampler(seed=0))

    def ratio(ours: str, theirs: str) -> float:  # of neighbouring runs; CMA-ES has but one
        return statistics.median(a / b for a, b in zip(spent[ours], cycle(spent[theirs])))

    label = f"CPU of {trials} trials in memory, K=5"
    yield at_most(1, f"{label}: DESampler / RandomSampler", ratio("shade", "random"), 0.75)
    yield at_most(
        1, f"{label}: define-by-run / RandomSampler", ratio("define-by-run", "random"), 0.75
    )
    yield at_most(1, f"{label}: DESampler / CmaEsSampler", ratio("shade", "cma"), 0.05)
    if "hub" in spent:
        yield at_most(1, f"{label}: DESampler / OptunaHub's", ratio("shade", "hub"), 0.85)
    else:
        yield info(1, f"{label}: DESampler / OptunaHub's", str(hub()))
    each = 1000 * statistics.median(spent["shade"]) / trials
    yield info(1, "CPU ms per trial, DESampler", f"{each:.3f}")
    growth = statistics.median(statistics.median(b[5:]) / b[0] for b in blocks)
    yield at_most(2, "CPU per trial, second half / first tenth", growth, 1.25)
    yield at_most(2, "whole-history reads per generation", _reads_per_generation(), 1, "")


@cache
def hub() -> ModuleType | str:
    """OptunaHub's sampler, which its package fetches over the network; or why it is absent."""
    if importlib.util.find_spec("optunahub") is None:
        return "absent: optunahub is not installed"
    import optunahub

    try:
        module: ModuleType = optunahub.load_module("samplers/differential_evolution")
    except Exception as error:  # git, HTTP or import errors: whatever keeps it away
        return f"absent: {type(error).__name__} on loading it from its registry"
    return module


def _reads_per_generation() -> float:
    class Spy(InMemoryStorage):
        reads = 0

        def get_all_trials(self, study_id, deepcopy=True, states=None):  # type: ignore[no-untyped-def]
            self.reads += states is None
            return super().get_all_trials(study_id, deepcopy, states)

    storage = Spy()
    study_with(de_sampler(), storage).optimize(single, n_trials=1000)
    return storage.reads / (1000 / 50)


def bar_3(quick: bool) -> Iterator[Row]:
    """Durable storages, on this disk, by the clock."""
    rounds: list[dict[str, float]] = []
    attributes = 0
    for _ in range(1 if quick else 5):
        with tempfile.TemporaryDirectory() as folder:
            rates, written = _durable_rates(Path(folder), 100 if quick else 300)
        rounds.append(rates)
        attributes += written

    def ratio(name: str, base: str) -> float:
        return statistics.median(rates[name] / rates[base] for rates in rounds)

    slow = "journal optimize"
    yield at_least(3, "journal: add_trials / optimize, trials/s", ratio("journal add", slow), 4)
    yield at_least(3, "journal: group commit / optimize", ratio("journal group", slow), 8)
    yield at_least(3, "sqlite: add_trials / optimize", ratio("sqlite add", "sqlite optimize"), 2)
    yield at_most(3, "system attributes written per trial", attributes, 0, "")
    medians = {name: statistics.median(rates[name] for rates in rounds) for name in rounds[0]}
    yield info(3, "trials/s", ", ".join(f"{name} {rate:.0f}" for name, rate in medians.items()))


def _durable_rates(folder: Path, trials: int) -> tuple[dict[str, float], int]:
    """Trials per second by way of keeping them, and the system attributes that were written."""
    rates, studies = {}, []

    def search(
        name: str,
        storage: optuna.storages.BaseStorage | str,
        count: int,
        run: Callable[[optuna.Study], object],
    ) -> None:
        study = study_with(de_sampler(25), storage)
        rates[name] = count / wall(lambda: run(study))
        studies.append(study)

    def journal(name: str) -> JournalStorage:
        return JournalStorage(JournalFileBackend(f"{folder}/{name}"))

    def one_by_one(study: optuna.Study, count: int = trials) -> None:
        study.optimize(PrefetchObjective(batch), count)

    def added(study: optuna.Study, count: int = trials) -> None:
        optimize_population(study, batch, count // 25)

    search("journal optimize", journal("one"), trials, one_by_one)
    search("journal add", journal("added"), trials, added)
    with GenerationJournalBackend(folder / "group", 25) as backend:
        search("journal group", JournalStorage(backend), trials, one_by_one)
    with GenerationJournalBackend(folder / "both", 25) as backend:
        search("journal group add", JournalStorage(backend), trials, added)
    few = trials // 4
    sqlite = f"sqlite:///{folder}/"
    search("sqlite optimize", f"{sqlite}one.db", few, lambda study: one_by_one(study, few))
    search("sqlite add", f"{sqlite}added.db", few, lambda study: added(study, few))
    trials_of = (study.get_trials(deepcopy=False) for study in studies)
    return rates, sum(len(trial.system_attrs) for each in trials_of for trial in each)


def bar_4(quick: bool) -> Iterator[Row]:
    """Whole generations under study.optimize."""
    trials, repeats = (1000, 1) if quick else (5000, 7)

    def free(trial: optuna.Trial) -> float:
        for name in NAMES:
            trial.suggest_float(name, 0.0, 1.0)
        return 0.0

    def zeros(rows_PK: np.ndarray) -> np.ndarray:
        return np.zeros(len(rows_PK))

    ways: dict[str, Callable[[optuna.Study], object]] = {
        "free": lambda study: study.optimize(free, n_trials=trials),
        "prefetch": lambda study: study.optimize(PrefetchObjective(zeros), n_trials=trials),
        "ask and tell": lambda study: optimize_population(study, zeros, trials // 50, "trials"),
    }
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for seed in range(repeats):
        for name, work in ways.items():
            study = study_with(de_sampler(seed=seed))
            spent[name].append(cpu(lambda: work(study)))  # noqa: B023 - called at once

    def ratio(name: str) -> float:
        pairs = zip(spent[name], spent["prefetch"], strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)

    yield at_least(4, "PrefetchObjective / a free objective, trials/s", ratio("free"), 0.9)
    yield at_least(
        4, "PrefetchObjective / public ask and tell, trials/s", ratio("ask and tell"), 1.2
    )


def bar_5(quick: bool) -> Iterator[Row]:
    """Objectives on 10 000 samples: 50 candidates at once against one at a time in full."""
    repeats = 2 if quick else 15
    yield from _objective_rows(10, 8, repeats)
    yield from _objective_rows(100, 60, repeats)


def _objective_rows(classes: int, nll_bar: float, repeats: int) -> Iterator[Row]:
    logits_KNC, labels_N = simulated(classes)
    probs_KNC = np.exp(log_probs(logits_KNC)).astype(np.float32)
    samples = np.arange(len(labels_N))
    weights_PK = from_cube(np.random.default_rng(0).random((50, 5)))
    single_PK = weights_PK.astype(np.float32)

    flat_KM = probs_KNC.reshape(5, -1)
    ways: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "einsum": lambda w_K: np.einsum("k,knc->nc", w_K, probs_KNC),
        "matmul": lambda w_K: (w_K @ flat_KM).reshape(len(labels_N), classes),
    }
    # The plain way is the faster of numpy's two; which one that is depends on C.
    mix = min(ways.values(), key=lambda way: min(cpu(lambda: way(single_PK[0])) for _ in range(5)))

    def plain_nll() -> list[float]:
        return [float(-np.log(mix(w_K)[samples, labels_N]).mean()) for w_K in single_PK[:20]]

    def plain_errors() -> list[float]:
        return [float((mix(w_K).argmax(axis=1) != labels_N).mean()) for w_K in single_PK[:20]]

    nll = MixtureNLL(logits_KNC, labels_N)
    errors = ErrorRate(np.exp(log_probs(logits_KNC)), labels_N)
    works: dict[str, tuple[Callable[[], object], int]] = {
        "nll": (plain_nll, 20),
        "fast nll": (lambda: [nll(weights_PK) for _ in range(10)], 500),
        "accuracy": (plain_errors, 20),
        "fast accuracy": (lambda: [errors(weights_PK) for _ in range(10)], 500),
    }
    rounds = [{name: cpu(work) for name, (work, _) in works.items()} for _ in range(repeats)]
    times = {
        name: min(each[name] for each in rounds) / candidates
        for name, (_, candidates) in works.items()
    }
    where = f"N=10 000, C={classes}"
    yield at_least(5, f"{where}: NLL, speed-up", times["nll"] / times["fast nll"], nll_bar)
    yield at_least(
        5,
        f"{where}: accuracy, speed-up",
        times["accuracy"] / times["fast accuracy"],
        25,
    )
    yield at_most(5, f"{where}: mismatches", _mismatches(errors, logits_KNC, labels_N), 0, "")
    micro = ", ".join(f"{name} {1e6 * seconds:.1f}" for name, seconds in times.items())
    yield info(5, f"{where}: CPU us per candidate", micro)


def _mismatches(errors: ErrorRate, logits_KNC: np.ndarray, labels_N: np.ndarray) -> int:
    """Samples on which the pruned error rate and plain argmax disagree, over 50 candidates."""
    probs_KNC = np.exp(log_probs(logits_KNC))
    weights_PK = from_cube(np.random.default_rng(1).random((50, 5)))
    plain = [
        int((np.tensordot(w_K, probs_KNC, axes=1).argmax(axis=1) != labels_N).sum())
        for w_K in weights_PK
    ]
    counted = np.rint(errors(weights_PK) * len(labels_N)).astype(int)
    return int(np.abs(counted - plain).sum())


def bar_6(quick: bool) -> Iterator[Row]:
    """Evaluations until the mixture's NLL is within 1e-6 of its certified minimum."""
    seeds, peer_seeds = (4, 2) if quick else (20, 7)
    limits = {"digits": (150, 450, 1800, 4500), "mc": (450, 900, 2600, 5500)}
    for dataset, bars in limits.items():
        for members, bar, budget in zip(
            (3, 5, 10, 20), bars, (3000, 6000, 12_000, 12_000), strict=True
        ):
            needed = [
                _evaluations(*some_members(dataset, members, seed), seed, budget)
                for seed in range(seeds)
            ]
            solved = sum(map(np.isfinite, needed))
            yield at_most(
                6, f"{dataset}, K={members}: evaluations", float(np.median(needed)), bar, ""
            )
            yield at_least(6, f"{dataset}, K={members}: seeds solved", solved, seeds, "")
            if members < 10:
                continue
            theirs = [
                _scipy_evaluations(*some_members(dataset, members, seed), seed, 12_000)
                for seed in range(peer_seeds)
            ]
            if members == 10:
                ratio = float(np.median(needed[:peer_seeds]) / np.median(theirs))
                yield at_most(6, f"{dataset}, K=10: evaluations / scipy best1bin", ratio, 0.5)
            else:
                count = sum(map(np.isfinite, theirs))
                yield at_most(
                    6, f"{dataset}, K=20: scipy best1bin solves, of {peer_seeds}", count, 0, ""
                )


class _Reached(Exception):
    pass


def _counting(
    nll: MixtureNLL, least: float
) -> tuple[Callable[[np.ndarray], np.ndarray], list[int]]:
    """The objective, stopped by _Reached at the first candidate that is good enough."""
    spent = [0]

    def counted(weights_PK: np.ndarray) -> np.ndarray:
        values_P = nll(weights_PK)
        good = np.flatnonzero(values_P <= least + TOLERANCE)
        spent[0] += len(values_P) if not len(good) else int(good[0]) + 1
        if len(good):
            raise _Reached
        return values_P

    return counted, spent


def _optimum(nll: MixtureNLL) -> float:
    weights_K, gap, _ = ExpectationMaximization(tolerance=1e-9).minimum(nll)
    if gap > 1e-8:
        raise RuntimeError(f"the oracle's own certificate is {gap:.1e}")
    return float(nll(weights_K[None])[0])


def _evaluations(logits_KNC: np.ndarray, labels_N: np.ndarray, seed: int, budget: int) -> float:
    nll = MixtureNLL(logits_KNC, labels_N)
    members = len(logits_KNC)
    size = default_population(members)
    counted, spent = _counting(nll, _optimum(nll))
    evolution = Evolution(Rules(size, seed=seed), np.ones(members, bool), np.zeros(members, bool))
    try:
        minimise(counted, evolution, budget // size)
    except _Reached:
        return spent[0]
    return np.inf


def _scipy_evaluations(
    logits_KNC: np.ndarray, labels_N: np.ndarray, seed: int, budget: int
) -> float:
    """Scipy's default strategy at our population size, weights as a box that is normalised."""
    from scipy.optimize import differential_evolution

    nll = MixtureNLL(logits_KNC, labels_N)
    members = len(logits_KNC)
    size = default_population(members)
    counted, spent = _counting(nll, _optimum(nll))
    start_PK = np.random.default_rng(seed).random((size, members))
    try:
        differential_evolution(
            lambda x: float(counted(x[None] / max(x.sum(), 1e-300))[0]),
            [(0, 1)] * members,
            strategy="best1bin",
            init=start_PK,
            maxiter=budget // size,
            tol=0,
            atol=0,
            polish=False,
            rng=seed,
        )
    except _Reached:
        return spent[0]
    return np.inf


def bar_7(quick: bool) -> Iterator[Row]:
    """The whole component, through its study, against the certified optimum."""
    for dataset in ("digits", "mc"):
        for members in (3, 5) if quick else (3, 5, 10, 20):
            logits_KNC, labels_N = some_members(dataset, members, 0)
            given = logits_KNC, labels_N, tuple(f"m{k}" for k in range(members)), 0
            started = time.process_time()
            found = DifferentialEvolution(shrink=False).find(*given)
            seconds = time.process_time() - started
            exact = ExpectationMaximization().find(*given)
            distance = abs(found.objective - exact.objective) + (exact.gap or 0.0)
            yield at_most(
                7,
                f"{dataset}, K={members}: DE - exact NLL, {found.evaluations} trials in "
                f"{seconds:.1f} s",
                distance,
                TOLERANCE,
                "",
            )


def bar_8(quick: bool) -> Iterator[Row]:
    """Bit-identity over 400 trials."""
    same = []
    for strategy in STRATEGIES:
        plain = study_with(de_sampler(strategy=strategy))
        plain.optimize(PrefetchObjective(batch), n_trials=400)
        batched = study_with(de_sampler(strategy=strategy))
        optimize_population(batched, batch, 8)
        storage = InMemoryStorage()
        for until in (137, 263, 400):
            resumed = study_with(de_sampler(strategy=strategy), storage)
            resumed.optimize(
                PrefetchObjective(batch), n_trials=until - len(resumed.get_trials(deepcopy=False))
            )
        same.append(_params(plain) == _params(batched) == _params(resumed))
    yield at_least(
        8, "strategies where sequential = batched = resumed twice", sum(same), len(same), ""
    )


def _params(study: optuna.Study) -> list[dict[str, float]]:
    return [trial.params for trial in study.get_trials(deepcopy=False)]


def bar_9(quick: bool) -> Iterator[Row]:
    """Untidy studies, and the time of a resume."""

    def pruned(trial: optuna.Trial) -> float:
        value = single(trial)
        if trial.number % 20 == 7:
            raise optuna.TrialPruned
        return value

    for strategy in ("rand1", "jade", "shade"):
        ratios, unique = [], []
        for seed in range(2 if quick else 11):
            untidy, clean = (study_with(de_sampler(20, strategy, seed)) for _ in range(2))
            untidy.optimize(pruned, n_trials=400)
            clean.optimize(single, n_trials=400)
            unique.append(len({tuple(row.values()) for row in _params(untidy)}))
            ratios.append(untidy.best_value / clean.best_value)
        what = f"{strategy}, one pruned per generation"
        yield at_least(9, f"{what}: fewest unique of 400", min(unique), 400, "")
        median = statistics.median(ratios)
        yield at_most(9, f"{what}: best value / that of a clean run, median", median, 10)
    study = study_with(de_sampler(20))
    study.enqueue_trial(dict(zip(NAMES, TARGET.tolist(), strict=True)))
    study.optimize(single, n_trials=20)
    joined = study.sampler.population(study)[1].min() == 0  # type: ignore[union-attr]
    yield at_least(9, "an enqueued optimum is in the population", int(joined), 1, "")
    trials = 2000 if quick else 10_000
    for size in (20, 50):
        seconds = _replay_seconds(size, trials)
        yield at_most(9, f"replay of {trials} trials, NP={size}", seconds, 0.5, " s")


def _replay_seconds(size: int, trials: int) -> float:
    study = study_with(de_sampler(size))
    study.optimize(PrefetchObjective(batch), n_trials=trials)
    return statistics.median(
        cpu(partial(fresh.generation, study)) for fresh in (de_sampler(size) for _ in range(3))
    )


def bar_10(quick: bool) -> Iterator[Row]:
    """Optuna's own conformance classes."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "shade"]
    tests = "tests/weightings/test_de_sampler.py::TestConformance"
    result = subprocess.run([*command, tests], cwd=ROOT, capture_output=True, text=True)
    last = result.stdout.strip().splitlines()[-1]
    passed = int(last.split(" passed")[0].split()[-1]) if " passed" in last else 0
    whole = result.returncode == 0 and passed > 0
    yield Row(10, "conformance tests", "all pass", last.split(" in ")[0], whole)


def bar_11(quick: bool) -> Iterator[Row]:
    """Test accuracy of the shipped weights minus that of uniform ones, in points."""
    splits = 3 if quick else 12
    small = (("digits", 10, 100), ("mc", 5, 100), ("mc", 20, 100))
    large = (("mc", 5, 1000), ("mc", 10, 1000), ("mc", 20, 1000))
    for settings, limit in ((small, -0.4), (large, 0.0)):
        for dataset, members, num_val in settings:
            gains = [_gain(dataset, members, num_val, split) for split in range(splits)]
            error = np.std(gains, ddof=1) / np.sqrt(splits)
            what = f"{dataset}, K={members}, n_val={num_val}: gain over uniform"
            mean = float(np.mean(gains))
            yield Row(
                11, what, f">= {limit:g} points", f"{mean:+.2f} +- {error:.2f}", mean >= limit
            )
    logits_KNC, labels_N = some_members("mc", 3, 0)
    names = ("a", "b", "c")
    weighting = Uniform()
    found = weighting.find(logits_KNC, labels_N, names, 0)
    record = weight_record(weighting, found, logits_KNC, labels_N, 0)
    shown = all("held_out_accuracy" in each for each in record["sets"].values())
    yield Row(11, "the record's figures are held out", "yes", "yes" if shown else "no", shown)


def _gain(dataset: str, members: int, num_val: int, split: int) -> float:
    logits_KNC, labels_N = members_of(dataset)
    rng = np.random.default_rng([3, split])
    chosen = np.sort(rng.choice(20, members, replace=False))
    order = rng.permutation(len(labels_N))
    fitted, tested = order[:num_val], order[num_val:]
    names = tuple(f"m{k}" for k in range(members))
    # Without a study: the same steps, bit for bit (bar 8 and the tests), in less time.
    weighting = DifferentialEvolution(study=False)
    found = weighting.find(logits_KNC[chosen][:, fitted], labels_N[fitted], names, split)
    probs_KNC = np.exp(log_probs(logits_KNC[chosen][:, tested]))

    def accuracy(weights_K: np.ndarray) -> float:
        mixed_NC = np.tensordot(weights_K, probs_KNC, axes=1)
        return float((mixed_NC.argmax(axis=1) == labels_N[tested]).mean())

    return 100 * (accuracy(found.weights_K) - accuracy(np.full(members, 1 / members)))


BARS = {
    1: bar_1_and_2, 3: bar_3, 4: bar_4, 5: bar_5, 6: bar_6, 7: bar_7, 8: bar_8, 9: bar_9,
    10: bar_10, 11: bar_11,
}  # fmt: skip


def main() -> int:
    """Measure, print, and say what holds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer trials and seeds")
    parser.add_argument("--bars", type=int, nargs="+", default=sorted(BARS), metavar="N")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore")
    started, load = time.perf_counter(), os.getloadavg()[0]
    print(f"### DESampler's bars{' (QUICK: too few trials to record)' if options.quick else ''}\n")
    print(
        f"optuna {optuna.__version__}, numpy {np.__version__}, scipy {scipy.__version__}, "
        f"Python {platform.python_version()}, {os.cpu_count()} cores, load {load:.1f} at the "
        f"start; OptunaHub's sampler: {hub() if isinstance(hub(), str) else 'loaded'}.\n"
    )
    print("| bar | what | wanted | measured | holds |\n| --- | --- | --- | --- | --- |")
    rows = []
    for number in options.bars:
        for row in BARS[number](options.quick):
            mark = {True: "yes", False: "**no**", None: ""}[row.holds]
            print(
                f"| {row.bar} | {row.what} | {row.wanted} | {row.measured} | {mark} |", flush=True
            )
            rows.append(row)
    broken = sorted({row.bar for row in rows if row.holds is False})
    seconds = time.perf_counter() - started
    verdict = f"do not hold: {broken}" if broken else "all hold"
    print(f"\nBars measured: {sorted({row.bar for row in rows})}; {verdict}. {seconds:.0f} s.")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
