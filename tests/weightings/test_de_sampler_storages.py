"""DESampler on durable storages: several processes, a killed process, the group-commit journal."""

import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from kd.weightings.de_sampler import (
    DESampler,
    GenerationJournalBackend,
    PrefetchObjective,
    optimize_population,
)

SIMPLEX = ("a", "b", "c")
TARGET = np.array([0.6, 0.4, 0.0])

WORKER = """
import sys
from tests.weightings.test_de_sampler_storages import open_study, single, PrefetchObjective, batch
kind, path, trials = sys.argv[1], sys.argv[2], int(sys.argv[3])
study = open_study(kind, path)
study.optimize(single if kind != "group" else PrefetchObjective(batch), n_trials=trials)
"""


@pytest.fixture
def folder(tmp_path):
    """In memory where the machine can: these tests are about what is written, not about fsync."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        yield Path(path)


@pytest.fixture(autouse=True)
def _quiet():
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def batch(rows_PD: np.ndarray) -> np.ndarray:
    return ((rows_PD - TARGET) ** 2).sum(axis=1)


def single(trial: optuna.Trial) -> float:
    return float(
        sum((trial.suggest_float(n, 0, 1) - t) ** 2 for n, t in zip(SIMPLEX, TARGET, strict=True))
    )


def open_study(kind: str, path: str | Path) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = {
        "memory": lambda: None,
        "journal": lambda: JournalStorage(JournalFileBackend(str(path))),
        "group": lambda: JournalStorage(GenerationJournalBackend(path, 10)),
        "sqlite": lambda: f"sqlite:///{path}?timeout=60",
    }[kind]()
    sampler = DESampler(simplex=SIMPLEX, population_size=10, seed=5)
    return optuna.create_study(
        study_name="s", storage=storage, sampler=sampler, load_if_exists=True
    )


def start_worker(kind: str, path: Path, trials: int) -> subprocess.Popen:
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, kind, str(path), str(trials)],
        cwd=root,
        stderr=subprocess.PIPE,
    )


def params(study: optuna.Study) -> list[tuple[float, ...]]:
    return [tuple(t.params.values()) for t in study.get_trials(deepcopy=False)]


def expected(trials: int) -> list[tuple[float, ...]]:
    study = open_study("memory", "")
    study.optimize(PrefetchObjective(batch), n_trials=trials)
    return params(study)


@pytest.mark.parametrize(
    ("kind", "trials"), [("journal", 10), pytest.param("sqlite", 20, marks=pytest.mark.slow)]
)
def test_three_processes_share_one_search_and_lose_nothing(kind, trials, folder):
    path = folder / "study"
    open_study(kind, path)  # sqlite's schema is made before anyone writes at the same time
    workers = [start_worker(kind, path, trials) for _ in range(3)]
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors.decode()
    study = open_study(kind, path)
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 3 * trials
    assert len(set(params(study))) >= 3 * trials - 3
    first = [t.value for t in study.trials[:10]]
    assert study.best_value < min(first)
    rows, values = study.sampler.population(study)
    occupants = [t.value for t in study.trials if t.number < len(study.trials) // 10 * 10]
    assert values.min() == min(occupants)
    np.testing.assert_allclose(rows.sum(axis=1), 1)


@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_durable_storages_give_the_search_of_the_one_in_memory(kind, folder):
    """Floats must survive the way through text or SQL to the last bit."""
    for until in (13, 40):
        study = open_study(kind, folder / "study")
        study.optimize(single, n_trials=until - len(study.trials))
    in_memory = open_study("memory", "")
    in_memory.optimize(single, n_trials=40)
    assert params(study) == params(in_memory)


def test_nan_is_a_category_like_others_on_a_durable_storage(folder):
    nan = float("nan")
    space = {"kind": CategoricalDistribution([1.0, nan]), "x": FloatDistribution(0, 1)}
    rows = []
    for storage in (None, f"sqlite:///{folder / 'study'}"):
        sampler = DESampler(space, seed=0, population_size=5)
        study = optuna.create_study(storage=storage, sampler=sampler)
        study.optimize(
            lambda trial: (
                (trial.suggest_categorical("kind", [1.0, nan]) == 1)
                + trial.suggest_float("x", 0, 1)
            ),
            n_trials=40,
        )
        rows.append(params(study))
        rows_PA, values_P = study.sampler.population(study)
        np.testing.assert_allclose(values_P, (rows_PA[:, 0] == 0) + rows_PA[:, 1])
    np.testing.assert_array_equal(*rows)


@pytest.mark.parametrize("kind", ["journal", "group"])
def test_a_search_killed_at_any_moment_resumes_to_the_same_end(kind, folder):
    path = folder / "study"
    worker = start_worker(kind, path, 100_000)
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_bytes().count(b"\n") > 200):
        assert time.monotonic() < deadline
        assert worker.poll() is None, worker.stderr.read().decode()
        time.sleep(0.01)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    worker.stderr.close()
    (folder / "study.lock").unlink(missing_ok=True)  # Optuna waits 30 s for a dead one

    study = open_study(kind, path)
    before = study.get_trials(deepcopy=False)
    assert len(before) >= 10
    orphans = [t.number for t in before if t.state == TrialState.RUNNING]
    assert len(orphans) <= 1
    if kind == "group":
        assert not orphans
    study.optimize(PrefetchObjective(batch), n_trials=40)
    if not orphans:  # else the orphan's slot rightly misses a value
        assert params(study) == expected(len(before) + 40)
    assert len(set(params(study))) == len(before) + 40


def test_the_group_commit_journal_is_a_plain_journal(folder):
    path = folder / "study"
    with GenerationJournalBackend(path, trials_per_commit=10) as backend:
        study = optuna.create_study(
            study_name="s",
            storage=JournalStorage(backend),
            sampler=DESampler(simplex=SIMPLEX, population_size=10, seed=5),
        )
        study.optimize(single, n_trials=9)
        assert len(study.trials) == 9
        assert path.read_bytes() == b""
        study.optimize(single, n_trials=1)
        lines = path.read_bytes().count(b"\n")
        assert lines > 10 * 5
        study.set_user_attr("note", {"pipeline": [1, 2]})
        study.optimize(single, n_trials=4)
        live = study.trials
    reread = open_study("journal", path)
    assert reread.trials == live
    assert reread.user_attrs == {"note": {"pipeline": [1, 2]}}
    reread.optimize(single, n_trials=6)
    assert params(reread) == expected(20)
    with GenerationJournalBackend(path) as backend:
        one, two = JournalStorage(backend), JournalStorage(backend)
        optuna.load_study(study_name="s", storage=one).set_user_attr("note", "pending")
        for storage in (one, two, JournalStorage(backend)):
            seen = optuna.load_study(study_name="s", storage=storage)
            assert seen.user_attrs == {"note": "pending"}
    assert open_study("group", path).user_attrs == {"note": "pending"}


def test_a_torn_last_line_is_cut_and_its_trials_are_evaluated_again(folder):
    path = folder / "study"
    with GenerationJournalBackend(path, 10) as backend:
        study = optuna.create_study(
            study_name="s",
            storage=JournalStorage(backend),
            sampler=DESampler(simplex=SIMPLEX, population_size=10, seed=5),
        )
        optimize_population(study, batch, 3)
    content = path.read_bytes()
    path.write_bytes(content[: content.rfind(b"\n", 0, -1) + 40])
    study = open_study("group", path)
    assert len(study.trials) == 29
    optimize_population(study, batch, 2)
    assert params(study) == expected(40)


def cut(path: Path, lines: int) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-lines]))


@pytest.mark.parametrize("lines", range(1, 12))
def test_a_journal_cut_at_the_end_of_any_line_goes_on_to_the_same_end(lines, folder):
    path = folder / "study"
    with GenerationJournalBackend(path, 10) as backend:
        study = optuna.create_study(
            study_name="s",
            storage=JournalStorage(backend),
            sampler=DESampler(simplex=SIMPLEX, population_size=10, seed=5),
        )
        study.optimize(single, n_trials=25)
    cut(path, lines)
    study = open_study("group", path)
    assert {trial.state for trial in study.trials} == {TrialState.COMPLETE}
    study.optimize(single, n_trials=40 - len(study.trials))
    assert params(study) == expected(40)


def test_enqueued_trials_still_wait_when_the_journal_is_opened_again(folder):
    path = folder / "study"
    enqueued = [{"a": 0.5, "b": 0.5 - third, "c": third} for third in (0.0, 0.1, 0.2)]
    with GenerationJournalBackend(path) as backend:
        study = optuna.create_study(study_name="s", storage=JournalStorage(backend))
        for point in enqueued:
            study.enqueue_trial(point)
    with GenerationJournalBackend(path) as backend:
        study = optuna.load_study(study_name="s", storage=JournalStorage(backend))
        assert [trial.state for trial in study.trials] == [TrialState.WAITING] * 3
        study.optimize(single, n_trials=1)
    cut(path, 1)
    study = open_study("group", path)
    assert [trial.state for trial in study.trials] == [TrialState.WAITING] * 3
    study.optimize(single, n_trials=3)
    assert [trial.params for trial in study.trials] == enqueued


def test_a_full_disk_costs_what_was_not_written_and_no_more(folder, monkeypatch):
    path = folder / "study"
    backend = GenerationJournalBackend(path, 10)
    study = optuna.create_study(
        study_name="s",
        storage=JournalStorage(backend),
        sampler=DESampler(simplex=SIMPLEX, population_size=10, seed=5),
    )
    optimize_population(study, batch, 1)
    content, write = path.read_bytes(), os.write

    def half(descriptor, data):
        if len(data) < 100:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[: len(data) // 2])

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", half)
        with pytest.raises(OSError, match="No space left"):
            optimize_population(study, batch, 1)
    assert path.read_bytes() == content
    backend.close()  # with room again
    assert params(open_study("journal", path)) == expected(20)


def test_a_disk_that_fails_is_told_of_by_the_next_commit(folder, monkeypatch):
    def fails(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    with GenerationJournalBackend(folder / "study", 10) as backend:
        study = optuna.create_study(
            storage=JournalStorage(backend),
            sampler=DESampler(simplex=SIMPLEX, population_size=10, seed=5),
        )
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", fails)
            optimize_population(study, batch, 1)
            with pytest.raises(OSError, match="Input/output"):
                optimize_population(study, batch, 1)


def test_attributes_are_kept_as_they_were_when_set(folder):
    with GenerationJournalBackend(folder / "study") as backend:
        study = optuna.create_study(storage=JournalStorage(backend))
        note = {"sizes": (1, 2)}
        study.set_user_attr("note", note)
        note["sizes"] = (3,)
        assert study.user_attrs == {"note": {"sizes": [1, 2]}}


def test_a_second_writer_is_refused_and_the_file_is_free_again_afterwards(folder):
    path = folder / "study"
    with GenerationJournalBackend(path), pytest.raises(RuntimeError, match="another process"):
        GenerationJournalBackend(path)
    GenerationJournalBackend(path, trials_per_commit=1).close()


def test_a_closed_journal_writes_into_no_file_that_was_opened_since(folder):
    backend = GenerationJournalBackend(folder / "study", 10)
    with backend:
        study = optuna.create_study(
            storage=JournalStorage(backend), sampler=DESampler(simplex=SIMPLEX, population_size=10)
        )
        optimize_population(study, batch, 1)
    content = (folder / "study").read_bytes()
    with (folder / "other").open("w"):  # has the descriptor's number now
        for trials in (1, 10):
            with pytest.raises(ValueError, match="the journal is closed"):
                study.optimize(single, n_trials=trials)
        with pytest.raises(ValueError, match="the journal is closed"):
            backend.commit()
    backend.close()
    assert (folder / "other").read_bytes() == b""
    assert (folder / "study").read_bytes() == content


@pytest.mark.parametrize("content", [b"precious text without newline", b"\n", b"[]\n{}\n"])
def test_a_file_that_is_no_journal_is_refused_and_left_alone(content, folder):
    path = folder / "notes.txt"
    path.write_bytes(content)
    for _ in range(2):  # the first refusal has given the file free
        with pytest.raises(ValueError, match=r"notes\.txt is not an Optuna journal"):
            GenerationJournalBackend(path)
    assert path.read_bytes() == content


def test_a_first_line_cut_short_is_begun_again(folder):
    path = folder / "study"
    path.write_bytes(b'{"op_co')
    GenerationJournalBackend(path).close()
    assert path.read_bytes() == b""


def test_a_closed_journal_is_free_though_a_process_that_was_forked_meanwhile_lives(folder):
    backend = GenerationJournalBackend(folder / "study")
    forked = os.fork()
    if not forked:
        time.sleep(60)
        os._exit(0)
    backend.close()
    GenerationJournalBackend(folder / "study").close()
    os.kill(forked, signal.SIGKILL)
    os.waitpid(forked, 0)


def test_a_forgotten_journal_writes_its_last_trials_when_the_program_ends(folder):
    path = folder / "study"
    worker = start_worker("group", path, 17)
    _, errors = worker.communicate(timeout=60)
    assert worker.returncode == 0, errors.decode()
    assert params(open_study("journal", path)) == expected(17)


def test_add_trials_writes_one_line_per_trial_and_no_attribute(folder):
    path = folder / "study"
    study = open_study("journal", path)
    before = path.read_bytes().count(b"\n")
    optimize_population(study, batch, 3)
    assert path.read_bytes().count(b"\n") == before + 30
    assert params(study) == expected(30)
    assert b"system_attr" not in path.read_bytes().replace(b'"system_attrs":{}', b"")


def test_replaying_takes_the_time_of_few_trials():
    """Half a second for 10 000 trials is the bar; benchmarks/de_sampler.py measures it."""
    study = open_study("memory", "")
    started = time.process_time()
    study.optimize(PrefetchObjective(batch), n_trials=2001)
    searched = time.process_time() - started
    study.sampler = DESampler(simplex=SIMPLEX, population_size=10, seed=5)
    started = time.process_time()
    study.sampler.generation(study)
    assert time.process_time() - started < searched
