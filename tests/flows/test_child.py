import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from flows import child, leash
from tests.flows.toys import SOURCES, lives, pid_in, wait_until

NEVER = threading.Event()


def run(script: str, tmp_path: Path, **more: object) -> tuple[int, list[str]]:
    heard: list[str] = []
    always = {"hear": heard.append, "stop": NEVER, "cwd": tmp_path, "env": dict(os.environ)}
    return child.run(["sh", "-c", script], **{**always, **more}), heard  # type: ignore[arg-type]


def stop_when_heard(script: str, tmp_path: Path) -> None:
    """Run it, and stop it once it says something: no clock tells how far it has come."""
    stop = threading.Event()
    with pytest.raises(child.Stopped):
        run(script, tmp_path, stop=stop, hear=lambda _: stop.set())


def test_lines_are_heard_and_the_exit_code_comes_back(tmp_path: Path) -> None:
    script = "echo one; echo two >&2; printf 'ten\\rlast'; exit 7"
    assert run(script, tmp_path) == (7, ["one", "two", "last"])


def test_a_line_is_heard_when_it_comes_not_when_the_command_ends(tmp_path: Path) -> None:
    script = "echo one; until test -e HEARD; do sleep 0.05; done"
    assert run(script, tmp_path, hear=lambda _: (tmp_path / "HEARD").touch(), timeout=30)[0] == 0


def test_death_by_a_signal_is_not_success_and_leaves_no_children_behind(tmp_path: Path) -> None:
    script = "sleep 600 & echo $! > PID; kill -9 $$"
    assert run(script, tmp_path)[0] == 128 + signal.SIGKILL
    assert not lives(pid_in(tmp_path / "PID"))


def test_a_daemon_left_behind_does_not_hold_us_up(tmp_path: Path) -> None:
    started = time.monotonic()
    assert run("setsid sleep 120 & echo done", tmp_path) == (0, ["done"])
    assert time.monotonic() - started < 100


def test_a_timeout_ends_the_whole_group(tmp_path: Path) -> None:
    timeout = 0.25
    while not (tmp_path / "PID").exists():  # a busy machine may take longer to start it
        timeout *= 2
        with pytest.raises(child.OutOfTime):
            run("sleep 600 & echo $! > PID; wait", tmp_path, timeout=timeout)
    assert not lives(pid_in(tmp_path / "PID"))


def test_stop_gives_the_group_time_to_end_its_records(tmp_path: Path) -> None:
    script = "trap 'sleep 0.5; echo closed > closed; exit' TERM; echo ready; sleep 600 & wait"
    stop_when_heard(script, tmp_path)
    assert (tmp_path / "closed").read_text() == "closed\n"


def test_a_stage_is_told_once_though_its_command_ends_before_it(tmp_path: Path) -> None:
    """A second SIGTERM would cut short what a stage saves."""
    stage = "trap 'echo told >> TOLD' TERM; echo ready; for i in $(seq 20); do sleep 0.1; done"
    (tmp_path / "stage.sh").write_text(stage)
    stop_when_heard("sh stage.sh & sleep 600 & wait", tmp_path)
    assert (tmp_path / "TOLD").read_text() == "told\n"


def test_a_leash_that_is_told_to_end_ends_its_command_even_at_once(tmp_path: Path) -> None:
    """As supervisord tells the programs of the stack."""
    script = "trap 'sleep 0.3; echo closed > closed; exit 3' TERM; kill $PPID; sleep 600 & wait"
    assert run(script, tmp_path)[0] == 3
    assert (tmp_path / "closed").exists()


@pytest.mark.slow
def test_who_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(child.OutOfTime):
        run("trap '' TERM; echo $$ > PID; while true; do sleep 1; done", tmp_path, timeout=0.5)
    assert not lives(pid_in(tmp_path / "PID"))
    assert time.monotonic() - started >= leash.GRACE


def test_the_command_dies_with_whoever_started_it(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, threading; from flows import child; "
        "child.run(['sh', '-c', 'echo $$ > PID; sleep 600; true'], cwd=pathlib.Path.cwd(), "
        "env=os.environ, hear=print, stop=threading.Event())"
    )
    env = {**os.environ, "PYTHONPATH": str(SOURCES)}
    starter = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=env)
    pid = pid_in(tmp_path / "PID")
    starter.kill()
    starter.wait()
    wait_until(lambda: not lives(pid))


def test_our_locks_stay_held_until_the_command_has_ended(tmp_path: Path) -> None:
    reader, lock = os.pipe()  # EOF comes once nobody holds the other end
    command, nowhere = ["sleep", "600"], subprocess.DEVNULL
    process = child.start(command, cwd=tmp_path, env=os.environ, output=nowhere, hold=[lock])
    os.close(lock)
    with open(reader, "rb") as held:
        assert not select.select([held], [], [], 0)[0]
        child.end(process)
        assert held.read() == b""


def test_a_leash_that_is_killed_itself_leaves_nothing_behind(tmp_path: Path) -> None:
    killed = "echo $$ > PID; kill -9 $PPID; sleep 600; true"
    assert run(killed, tmp_path)[0] == 128 + signal.SIGKILL
    wait_until(lambda: not lives(pid_in(tmp_path / "PID")))
