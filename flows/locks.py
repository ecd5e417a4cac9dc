"""One flow per workspace, and as many concurrent stages as the machine has room for.

Locks are `flock`s on files, so the kernel releases them when their holder dies.  A stage's child
process inherits its slot: if a flow is killed, its training keeps the slot until it exits too.
"""

import contextlib
import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import filelock
import psutil

from flows.child import Stopped
from kd.component import ConfigError
from kd.tracking import contact

POLL = 0.2
"""Seconds between attempts to take a slot."""

SEATS = 12
"""Parts a GPU is divided into, so that halves, thirds, quarters and sixths are whole numbers."""

LAST_RITES = 15.0
"""Seconds to wait for the stages of a killed flow to exit; the leash kills them after ten."""


class WorkspaceBusyError(Exception):
    """Another flow is running in this folder."""


class TooFewGPUsError(Exception):
    """A stage needs more GPUs than this machine has."""


@contextlib.contextmanager
def workspace(root: Path) -> Iterator[int]:
    """Lock `root` for one flow; yield the lock's descriptor.

    Two flows in one folder would write the same outputs, and DVC's own locks fail rather than
    wait.

    Raises:
        kd.component.ConfigError: `root` has no dvc.yaml; locking a subfolder protects nothing.
        WorkspaceBusyError: another flow holds it; the message says which.
    """
    if not (root / "dvc.yaml").exists():
        raise ConfigError(f"no dvc.yaml is in {root}: run from the project's root")
    path = root / ".kd" / "flow.lock"
    path.parent.mkdir(exist_ok=True)
    with _opened(path) as descriptor:
        if not _taken(descriptor, path):
            raise WorkspaceBusyError(
                f"{path.read_text().strip() or 'another flow'} is running in {root}: "
                "wait for it, or stop it"
            )
        _mend(root / ".dvc" / "tmp" / "rwlock")
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"a flow (process {os.getpid()}, since {time.ctime()})".encode(), 0)
        yield descriptor


def _mend(path: Path) -> None:
    """Delete DVC's lock file if a `dvc` was killed while it wrote it, else DVC fails for ever."""
    with contextlib.suppress(FileNotFoundError):
        try:
            json.loads(path.read_text())
        except ValueError:
            if path.stat().st_mtime < time.time() - 1:  # else it may just be being written
                path.unlink()


def _taken(descriptor: int, path: Path) -> bool:
    """Try to take the lock; if its holder is dead, wait for that flow's processes to exit."""
    deadline = time.monotonic() + LAST_RITES
    while not filelock.lock_descriptor(descriptor, blocking=False):
        holder = re.search(r"process (\d+)", path.read_text())
        if not holder or psutil.pid_exists(int(holder[1])) or time.monotonic() > deadline:
            return False
        time.sleep(POLL)
    return True


@dataclass(frozen=True)
class Slot:
    """The GPUs or CPU threads that a stage may use while it runs."""

    name: str
    """For display: "GPU 1", "2 threads"."""

    env: Mapping[str, str]
    """Environment variables that confine the stage to its slot."""

    descriptors: Sequence[int]
    """The locks; pass them to the stage's process."""


@dataclass(frozen=True)
class Slots:
    """The GPUs and CPU threads of this machine, shared by all its flows."""

    folder: Path
    gpus: tuple[str, ...]
    """Named as in CUDA_VISIBLE_DEVICES."""

    threads: int

    @contextlib.contextmanager
    def take(
        self, *, threads: int, gpu: float, stop: threading.Event, seconds: float = 0.0
    ) -> Iterator[Slot]:
        """Wait for a slot: on GPUs if `gpu` is set and there are any, else `threads` CPU threads.

        Args:
            threads: CPU threads the stage keeps busy; capped at the machine's number.
            gpu: The fraction of a GPU to take, or a number of whole GPUs; 0 for none.
            stop: Ends the wait when set.
            seconds: Expected duration; among those waiting in this process, the longest goes
                first.

        Raises:
            Stopped: `stop` was set before a slot was free.
            TooFewGPUsError: the machine does not have that many GPUs.
        """
        on_gpu = gpu > 0 and bool(self.gpus)
        if on_gpu and gpu > len(self.gpus):
            raise TooFewGPUsError(
                f"meta.gpu in dvc.yaml is {gpu:g}, but only {len(self.gpus)} GPU(s) are visible "
                f"({', '.join(self.gpus)}): lower it, and recipe.devices with it"
            )
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        slot = None
        with _in_line((self.folder, on_gpu), seconds) as me:
            while slot is None:
                if stop.wait(POLL):  # even at first: a longer one may be about to join
                    raise Stopped
                if me.is_next():
                    slot = self._take_gpus(gpu) if on_gpu else self._take_threads(threads)
        try:
            yield slot
        finally:
            _close(slot.descriptors)

    def _take_threads(self, threads: int) -> Slot | None:
        """All or nothing, so that two stages that need both of two threads never get one each."""
        wanted = max(1, min(threads, self.threads))
        with self._one_at_a_time():
            taken = self._lock("thread", self.threads, wanted)
            if len(taken) == wanted:
                return Slot(f"{wanted} thread{'s' if wanted > 1 else ''}", {}, taken)
            _close(taken)
            return None

    def _take_gpus(self, wanted: float) -> Slot | None:
        """A fraction of a GPU, or several whole ones, preferring those with most free seats.

        All or nothing, as with threads.
        """
        count, seats = max(1, round(wanted)), max(1, round(min(wanted, 1) * SEATS))
        with self._one_at_a_time():
            free = {gpu: self._lock(f"gpu-{gpu}", SEATS, SEATS) for gpu in self.gpus}
            chosen = sorted(self.gpus, key=lambda each: -len(free[each]))[:count]
            fits = all(len(free[gpu]) >= seats for gpu in chosen)
            taken = [each for gpu in chosen for each in free[gpu][:seats]] if fits else []
            _close([each for found in free.values() for each in found if each not in taken])
        names = ",".join(gpu for gpu in self.gpus if gpu in chosen)
        return Slot(f"GPU {names}", {"CUDA_VISIBLE_DEVICES": names}, taken) if taken else None

    @contextlib.contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        with _opened(self.folder / "door") as door:
            filelock.lock_descriptor(door)
            yield

    def _lock(self, kind: str, count: int, most: int) -> list[int]:
        """Take up to `most` free locks among the `count` of a kind; return their descriptors."""
        taken: list[int] = []
        for number in range(count):
            if len(taken) == most:
                break
            path = self.folder / f"{kind}-{number}"
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            if filelock.lock_descriptor(descriptor, blocking=False):
                taken.append(descriptor)
            else:
                os.close(descriptor)
        return taken


class _Place:
    """A place in this process's queue for slots of one kind."""

    def __init__(self, kind: object, seconds: float) -> None:
        self.kind = kind
        self.seconds = seconds

    def is_next(self) -> bool:
        """Whether it has the longest duration in its queue; ties go to the first in line."""
        with _line_lock:
            return self is max(
                (each for each in _line if each.kind == self.kind), key=lambda each: each.seconds
            )


_line: list[_Place] = []
_line_lock = threading.Lock()


@contextlib.contextmanager
def _in_line(kind: object, seconds: float) -> Iterator[_Place]:
    place = _Place(kind, seconds)
    with _line_lock:
        _line.append(place)
    try:
        yield place
    finally:
        with _line_lock:
            _line.remove(place)


def _close(descriptors: Sequence[int]) -> None:
    for each in descriptors:
        os.close(each)


def slots() -> Slots:
    """This machine's slots.  KD_CPUS overrides the detected number of CPU threads.

    Raises:
        ValueError: KD_CPUS is not a positive integer.
        PermissionError: the folder of their locks is not this user's alone.
    """
    threads = os.environ.get("KD_CPUS") or str(_cpus())
    if not threads.isdecimal() or int(threads) < 1:
        raise ValueError(f"KD_CPUS is {threads!r}; it must be a positive integer")
    return Slots(
        folder=contact.folder() / "slots",  # other users could take them all, but for its mode
        gpus=_gpus(),
        threads=int(threads),
    )


def _cpus() -> int:
    """Number of CPUs this process may use; macOS only knows the machine's total."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def _gpus() -> tuple[str, ...]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        try:
            visible = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            return ()
    return tuple(each for each in visible.replace(",", " ").split() if each != "-1")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
