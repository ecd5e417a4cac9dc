"""Ctrl-C ends what was started by hand as shells have it: status 130, and no traceback."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from kd import signals, stopping
from kd.compare import work
from kd.compare.plan import Comparison
from tests.flows.toys import wait_until
from tests.test_compare import written
from tests.test_pipeline import PROJECT, experiment, kd

WAITING = "import time; from kd import signals; signals.end_quietly(); print(); time.sleep(99)"


def start(folder: Path, *command: str, **env: str) -> subprocess.Popen[str]:
    """A process that leads a group of its own, as a shell's foreground job does."""
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(PROJECT), "PYTHONUNBUFFERED": "1", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )


def ctrl_c(process: subprocess.Popen[str]) -> None:
    """Tell a whole group to end, as a terminal does."""
    os.killpg(process.pid, signal.SIGINT)


def interrupted(
    process: subprocess.Popen[str],
    first: str,
    tell: Callable[[subprocess.Popen[str]], None] = ctrl_c,
) -> tuple[int, str, str]:
    """What a process ends with and says that is told to end when it has said `first`."""
    assert process.stdout is not None
    wait_until(lambda: first in process.stdout.readline())
    tell(process)
    try:
        said, errors = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # it would take the next tests' time
        raise
    return process.returncode, said, errors


def is_alive(group: int) -> bool:
    """Whether a process of a group still runs."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_process_without_a_traceback(number, status, tmp_path):
    process = start(tmp_path, "-c", WAITING)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(number)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == status


def test_a_signal_that_was_ignored_stays_ignored(tmp_path):
    code = (
        "import signal; from kd import signals; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        "signals.end_quietly(); signal.raise_signal(signal.SIGINT)"
    )
    process = start(tmp_path, "-c", code)
    assert (*process.communicate(timeout=60), process.returncode) == ("", "", 0)


def test_a_signal_stops_the_next_training_where_its_exception_was_swallowed():
    signals.end_quietly()
    with suppress(SystemExit):
        signal.raise_signal(signal.SIGTERM)
    with stopping.asked_to_stop() as stop:
        assert stop()


def test_a_signal_between_two_units_keeps_the_next_from_beginning(tmp_path):
    comparison = Comparison(written(tmp_path))
    signal.signal(signal.SIGTERM, work.note)
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        work.do_unless_told(comparison, comparison.units["seed-1/data"])
    assert signal.getsignal(signal.SIGTERM) is work.note


@contextmanager
def warm_process(folder: Path) -> Iterator[str]:
    """The socket of a process from which stages are forked."""
    with tempfile.TemporaryDirectory() as short:  # pytest's own paths are too long for a socket
        path = f"{short}/socket"
        server = start(folder, "-m", "kd.warm", path)
        wait_until(lambda: os.path.exists(path))
        yield path
        server.kill()
        server.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["alone", "warm"])
def test_a_stage_says_that_it_can_be_run_again_and_nothing_else(way, tmp_path):
    experiment(tmp_path, **{"recipe.epochs": 2000, "teacher.model.depth": 2})
    assert kd(tmp_path, "data").returncode == 0
    if way == "alone":
        ended = interrupted(start(tmp_path, "-m", "kd", "teacher"), "epoch 1/")
    else:
        with warm_process(tmp_path) as path:
            stage = start(tmp_path, "-m", "kd", "teacher", KD_WARM_SOCKET=path)
            ended = interrupted(stage, "epoch 1/")
    status, said, errors = ended
    assert (status, errors) == (130, "")
    assert said.splitlines()[-1].startswith("stopped after step")


@pytest.mark.slow
@pytest.mark.parametrize(("tell", "status"), [(ctrl_c, 130), (subprocess.Popen.terminate, 143)])
def test_a_comparison_takes_its_processes_along_and_says_that_it_goes_on(tell, status, tmp_path):
    written(tmp_path, recipe={"epochs": 500, "batch_size": 64})
    process = start(tmp_path, "-m", "kd.compare", "params.compare.yaml", "--processes", "2")
    ended, _, errors = interrupted(process, "seed-1/data", tell)
    said = "stopped; finished work is kept, and the next run resumes from it\n"
    assert (ended, errors) == (status, said)
    wait_until(lambda: not is_alive(process.pid))
