import contextlib
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from flows import locks
from flows.child import Stopped
from tests.flows.toys import SOURCES, Toy, lives, pid_in, timed, wait_until

NEVER = threading.Event()
HOLDER = """
import pathlib, subprocess, sys, threading, time
from flows import locks
slots = locks.Slots(pathlib.Path(sys.argv[1]), (), 1)
with slots.take(threads=1, gpu=False, stop=threading.Event()) as slot:
    if sys.argv[2:]:
        open(sys.argv[2], "w").write(
            str(subprocess.Popen(["sleep", "600"], pass_fds=slot.descriptors).pid)
        )
    print("held", flush=True)
    time.sleep(60)
"""


class OneAttempt(threading.Event):
    """Ends the wait for a slot after one attempt, however fast the machine is."""

    def wait(self, timeout: float | None = None) -> bool:
        tried = self.is_set()
        self.set()
        return tried


def hold(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), *arguments],
        env={**os.environ, "PYTHONPATH": str(SOURCES)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout
    wait_until(lambda: holder.stdout.readline() == "held\n")
    return holder


def seconds_until_free(slots: locks.Slots) -> float:
    started = time.monotonic()
    with slots.take(threads=1, gpu=False, stop=NEVER):
        return time.monotonic() - started


def test_a_second_flow_is_told_who_works_there(tmp_path: Path) -> None:
    (tmp_path / "dvc.yaml").touch()
    with (
        locks.workspace(tmp_path),
        pytest.raises(locks.WorkspaceBusyError) as refused,
        locks.workspace(tmp_path),
    ):
        pass
    assert f"a flow (process {os.getpid()}, since" in str(refused.value)
    assert str(tmp_path) in str(refused.value)
    with locks.workspace(tmp_path):
        pass


def test_a_lock_file_that_a_killed_dvc_left_empty_does_not_stop_the_next(toy: Toy) -> None:
    toy.write({"one": timed("one", 0)})
    left = toy.path(".dvc/tmp/rwlock")
    left.write_text("")
    os.utime(left, (time.time() + 60,) * 2)  # as if just now, however long this test takes
    with locks.workspace(toy.root):
        assert left.exists(), "a dvc may be writing it"
    os.utime(left, (time.time() - 5,) * 2)
    with locks.workspace(toy.root):
        toy.dvc("repro")


def test_a_gpu_is_handed_out_once_and_its_number_goes_to_the_stage(tmp_path: Path) -> None:
    slots = locks.Slots(tmp_path, ("0", "3"), 4)
    with (
        slots.take(threads=4, gpu=True, stop=NEVER) as one,
        slots.take(threads=4, gpu=True, stop=NEVER) as two,
        slots.take(threads=4, gpu=False, stop=NEVER) as cpu,
    ):
        assert [one.env, two.env, cpu.env] == [
            {"CUDA_VISIBLE_DEVICES": "0"},
            {"CUDA_VISIBLE_DEVICES": "3"},
            {},
        ]
        assert (one.name, cpu.name) == ("GPU 0", "4 threads")
        with pytest.raises(Stopped), slots.take(threads=1, gpu=True, stop=OneAttempt()):
            pass


def test_stages_that_take_a_share_of_a_gpu_sit_on_it_together(tmp_path: Path) -> None:
    slots = locks.Slots(tmp_path, ("0", "1"), 4)
    with contextlib.ExitStack() as running:
        taken = [
            running.enter_context(slots.take(threads=1, gpu=share, stop=NEVER))
            for share in (0.5, 0.5, 1 / 3, 0.5)
        ]
        # Each goes where most is free, and two thirds of a GPU are not free for a whole one.
        assert [each.env["CUDA_VISIBLE_DEVICES"] for each in taken] == ["0", "1", "0", "1"]
        with pytest.raises(Stopped), slots.take(threads=1, gpu=0.5, stop=OneAttempt()):
            pass
    with (
        slots.take(threads=1, gpu=1, stop=NEVER) as one,
        slots.take(threads=1, gpu=1, stop=NEVER) as other,
    ):
        assert {one.name, other.name} == {"GPU 0", "GPU 1"}


def test_several_whole_gpus_are_taken_at_once_or_none(tmp_path: Path) -> None:
    slots = locks.Slots(tmp_path, ("0", "3", "5"), 4)
    with slots.take(threads=1, gpu=0.5, stop=NEVER) as half:
        with slots.take(threads=1, gpu=2, stop=NEVER) as two:
            assert half.env == {"CUDA_VISIBLE_DEVICES": "0"}
            assert (two.name, two.env) == ("GPU 3,5", {"CUDA_VISIBLE_DEVICES": "3,5"})
        with pytest.raises(Stopped), slots.take(threads=1, gpu=3, stop=OneAttempt()):
            pass
        with slots.take(threads=1, gpu=2, stop=NEVER):  # who wants three holds none of them
            pass
    with slots.take(threads=1, gpu=3, stop=NEVER) as three:
        assert three.env == {"CUDA_VISIBLE_DEVICES": "0,3,5"}


def test_who_waits_for_several_gpus_gets_them_once_they_are_free(tmp_path: Path) -> None:
    slots = locks.Slots(tmp_path, ("0", "1"), 4)
    got: list[str] = []

    def work() -> None:
        with slots.take(threads=1, gpu=2, stop=NEVER) as slot:
            got.append(slot.env["CUDA_VISIBLE_DEVICES"])

    waiting = threading.Thread(target=work)
    with slots.take(threads=1, gpu=1, stop=NEVER):
        waiting.start()
        wait_until(lambda: len(locks._line) == 1)
    waiting.join(30)
    assert got == ["0,1"]


def test_a_stage_that_wants_more_gpus_than_there_are_fails_at_once(tmp_path: Path) -> None:
    slots = locks.Slots(tmp_path, ("0", "3"), 4)
    with (
        pytest.raises(locks.TooFewGPUsError, match=r"meta.gpu .* is 4, .* only 2 GPU"),
        slots.take(threads=1, gpu=4, stop=NEVER),
    ):
        pass
    with locks.Slots(tmp_path, (), 4).take(threads=2, gpu=4, stop=NEVER) as slot:
        assert slot.name == "2 threads"  # without any GPU it runs on the processor


def test_of_those_that_wait_the_longest_is_next_and_of_equals_the_first(tmp_path: Path) -> None:
    slots = locks.Slots(tmp_path, (), 1)
    order: list[float] = []

    def work(seconds: float) -> None:
        with slots.take(threads=1, gpu=0, stop=NEVER, seconds=seconds):
            order.append(seconds)

    with slots.take(threads=1, gpu=0, stop=NEVER):
        waiting = [threading.Thread(target=work, args=(each,)) for each in (1, 30, 2, math.inf)]
        for each in waiting:
            each.start()
        wait_until(lambda: len(locks._line) == len(waiting))
    for each in waiting:
        each.join(30)
    assert order == [math.inf, 30, 2, 1]


def test_threads_are_shared_out_and_a_wish_beyond_the_machine_gets_all(tmp_path: Path) -> None:
    slots = locks.Slots(tmp_path, (), 4)
    running, most, door = 0, 0, threading.Lock()

    def work(threads: int) -> None:
        nonlocal running, most
        with slots.take(threads=threads, gpu=True, stop=NEVER) as slot:
            with door:
                running += len(slot.descriptors)
                most = max(most, running)
            time.sleep(0.1)
            with door:
                running -= len(slot.descriptors)

    workers = [threading.Thread(target=work, args=(each,)) for each in (2, 2, 1, 99, 3, 2, 1, 4)]
    for each in workers:
        each.start()
    for each in workers:
        each.join(30)
    assert not any(each.is_alive() for each in workers)
    assert most == 4


def test_a_slot_is_free_again_when_its_holder_is_killed(tmp_path: Path) -> None:
    holder = hold(tmp_path)
    holder.kill()
    assert seconds_until_free(locks.Slots(tmp_path, (), 1)) < 30
    holder.communicate()


def test_a_stage_keeps_its_slot_when_only_the_flow_is_killed(tmp_path: Path) -> None:
    slots = locks.Slots(tmp_path, (), 1)
    holder = hold(tmp_path, str(tmp_path / "PID"))
    holder.kill()
    holder.wait()
    with pytest.raises(Stopped), slots.take(threads=1, gpu=False, stop=OneAttempt()):
        pass
    os.kill(pid_in(tmp_path / "PID"), signal.SIGKILL)
    assert seconds_until_free(slots) < 30
    holder.communicate()


PROMOTING = """
import pathlib, sys, threading
from flows import locks
from flows.promote import promote
with locks.workspace(root := pathlib.Path.cwd()) as workspace:
    env = {"PYTHONPATH": sys.argv[1]}
    promote(root, None, env=env, hear=print, stop=threading.Event(), workspace=workspace)
"""
SLOW_TO_END = """
import os, pathlib, signal, time
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(2), os._exit(0)))
pathlib.Path("PID").write_text(str(os.getpid()))
time.sleep(600)
"""
"""What Python runs as it starts; it stands for `kd promote` amid its work."""


def test_a_killed_flows_promotion_keeps_the_workspace_until_it_has_ended(toy: Toy) -> None:
    toy.write({})
    toy.path("sitecustomize.py").write_text(SLOW_TO_END)
    flow = subprocess.Popen(
        [sys.executable, "-c", PROMOTING, str(toy.root)],
        cwd=toy.root,
        env={**os.environ, "PYTHONPATH": str(SOURCES)},
    )
    pid = pid_in(toy.path("PID"))
    flow.kill()
    flow.wait()
    with locks.workspace(toy.root):
        assert not lives(pid)


@pytest.mark.parametrize(("visible", "gpus"), [("", ()), ("-1", ()), ("2,5", ("2", "5"))])
def test_the_gpus_are_those_that_the_user_left_visible(
    visible: str, gpus: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert locks.slots().gpus == gpus


@pytest.mark.parametrize(("status", "gpus"), [(0, ("0", "1")), (9, ())])
def test_otherwise_the_gpus_are_those_that_the_driver_lists(
    status: int, gpus: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert locks.slots().gpus == ()
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho 0\necho 1\nexit {status}\n")
    program.chmod(0o700)
    assert locks.slots().gpus == gpus


def test_the_number_of_threads_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (1, 3):
        monkeypatch.setenv("KD_CPUS", str(number))
        assert locks.slots().threads == number
    for wrong in ("0", "-1", "two"):
        monkeypatch.setenv("KD_CPUS", wrong)
        with pytest.raises(ValueError, match=f"KD_CPUS is '{wrong}'; it must be a positive"):
            locks.slots()
