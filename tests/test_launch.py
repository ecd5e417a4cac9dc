"""Ranks that start and end as one: with toys here, with the real `kd` below."""

import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kd import launch
from tests.test_pipeline import experiment, kd

PROJECT = Path(__file__).parents[1]
RANK = "import os, signal, sys, time; from kd import launch; rank = int(os.environ['RANK'])\n"


def toy(script: str) -> list[str]:
    return [sys.executable, "-c", RANK + script]


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("pass", 0),
        ("sys.exit(launch.falls_first(2) and 2 or 3)", 2),
        ("sys.exit(5 * rank)", 5),
        ("rank and os.kill(os.getpid(), signal.SIGKILL)", 137),
    ],
    ids=["good", "first", "one", "killed"],
)
def test_the_status_is_that_of_the_rank_that_failed_first_and_nothing_else_changes(script, status):
    def surroundings():
        handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
        return dict(os.environ), handlers, logging.root.isEnabledFor(logging.CRITICAL)

    before = surroundings()
    assert launch.run(toy(script), 2) == status
    assert surroundings() == before


def test_one_rank_alone_tells_of_an_error_that_nobody_caught(capfd):
    assert launch.run(toy("launch.become_rank()\nraise ValueError('why')"), 3) == 1
    assert capfd.readouterr().err.count("ValueError: why") == 1


TELLS_SLOWLY = """
if launch.falls_first(1):
    time.sleep(2)  # the other one is gone by now, for which torchrun ends this one
    print("why", file=sys.stderr)
sys.exit(1)
"""


def test_the_rank_that_failed_first_is_given_the_time_to_tell_why(capfd):
    assert launch.run(toy(TELLS_SLOWLY), 2) == 1
    assert capfd.readouterr().err == "why\n"


def test_who_waits_for_a_rank_that_failed_is_ended():
    assert launch.run(toy("time.sleep(99 * rank)\nsys.exit(4)"), 2) == 4


SIGNALLED = """
import sys; from kd import launch
rank = '''
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
os.write(1, b'ready' + bytes([10]))  # at once: print may be cut in two by the other rank
time.sleep(99)
'''
sys.exit(launch.run([sys.executable, '-c', rank], 2))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_all_ranks(number):
    launcher = subprocess.Popen(
        [sys.executable, "-c", SIGNALLED],
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert launcher.stdout is not None
    assert [launcher.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    launcher.send_signal(number)
    assert launcher.stdout.read() == ""  # which the ranks held open
    launcher.stdout.close()
    assert launcher.wait(60) == 128 + number


def test_a_signal_that_the_launcher_was_started_to_ignore_ends_nothing():
    ignored = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    launcher = subprocess.Popen(
        [sys.executable, "-c", ignored + SIGNALLED.replace("sleep(99)", "sleep(1)")],
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert launcher.stdout is not None
    assert [launcher.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    launcher.send_signal(signal.SIGINT)
    launcher.communicate(timeout=60)
    assert launcher.returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
def test_ranks_die_with_their_launcher():
    script = SIGNALLED.replace(
        "os.write(", "from kd import launch; launch.become_rank(); os.write("
    )
    assert script != SIGNALLED
    launcher = subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert launcher.stdout is not None
    assert [launcher.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    launcher.kill()
    said, _ = launcher.communicate(timeout=30)  # the ranks hold its pipe open, for 99 s
    assert said == ""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_while_the_other_waits_for_it_tells_why_and_ends_it(rank, capfd):
    command = [sys.executable, "-m", "tests.train.fit_here", "interrupted", f'{{"rank": {rank}}}']
    assert launch.run(command, 2) == 1
    said = capfd.readouterr().err
    assert said.count("ValueError: why") == said.count("Traceback") == 1


SMALL = {
    "recipe.device": "cpu",
    "recipe.devices": 2,
    "recipe.epochs": 20,
    "recipe.checkpoint_minutes": 1000,
    "recipe.checkpoint_steps": None,
    "teacher.model.depth": 2,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A prepared data set."""
    folder = tmp_path_factory.mktemp("data")
    experiment(folder, **SMALL)
    done = kd(folder, "data")
    assert done.returncode == 0, done.stderr
    return folder / "artifacts"


@pytest.fixture
def workspace(data, tmp_path):
    """A folder in which a small teacher is to be trained by two ranks."""
    shutil.copytree(data, tmp_path / "artifacts")
    experiment(tmp_path, **SMALL)
    return tmp_path


@contextmanager
def in_training(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A teacher after its first epoch."""
    with subprocess.Popen(
        [sys.executable, "-m", "kd", "teacher"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as started:
        assert started.stdout is not None
        assert "epoch 1/20" in started.stdout.readline()
        yield started


@pytest.mark.slow
def test_bad_input_is_told_once_and_ends_with_status_2(workspace):
    images = workspace / "artifacts/data/train/images.npy"
    images.write_bytes(images.read_bytes()[:-100])
    done = kd(workspace, "teacher")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("holds no prepared data") == len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_training_that_diverges_is_told_once_and_ends_with_status_1(workspace):
    experiment(workspace, **SMALL, **{"recipe.optimizer.lr": 1e30, "recipe.clip_norm": None})
    done = kd(workspace, "teacher")
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: the loss was not finite at step")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ranks_that_are_told_to_end_save_their_step_and_go_on_from_it(workspace, number):
    with in_training(workspace) as started:
        started.send_signal(number)
        said, errors = started.communicate(timeout=60)
    assert started.returncode == 128 + number
    assert said.count("stopped after step") == 1
    assert errors == ""
    done = kd(workspace, "teacher")
    assert done.returncode == 0, done.stderr
    assert "epoch 1/20" not in done.stdout
    assert done.stdout.count("epoch 20/20") == 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
def test_nothing_trains_on_once_the_launcher_is_killed(workspace):
    with in_training(workspace) as started:
        started.kill()
        started.communicate(timeout=60)  # until no process holds its output open
    assert not (workspace / "artifacts/teacher/model.safetensors").exists()
