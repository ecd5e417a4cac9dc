"""One flow a workspace, and as many stages at once as the machine has room for.

Locks are `flock`s on files, so the kernel frees them when their holder dies.  A stage's child
process inherits its slot: a killed flow's training keeps it until that process is gone too.
"""

import contextlib
import os
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import filelock
import psutil

from flows.child import Stopped

POLL = 0.2
"""Seconds between attempts to take a slot."""


LAST_RITES = 15.0
"""Seconds that a killed flow's stages are given to end: they are killed after ten."""


class WorkspaceBusyError(Exception):
    """Another flow works in this folder."""


@contextlib.contextmanager
def workspace(root: Path) -> Iterator[int]:
    """Hold `root` for one flow; yield the lock's descriptor.

    Two flows in one folder would write the same outputs, and DVC's own locks fail rather than
    wait.

    Raises:
        WorkspaceBusyError: another flow holds it; the message says which.
    """
    path = root / ".kd" / "flow.lock"
    path.parent.mkdir(exist_ok=True)
    with _opened(path) as descriptor:
        if not _taken(descriptor, path):
            raise WorkspaceBusyError(
                f"{path.read_text().strip() or 'another flow'} works in {root}: "
                "wait for it, or stop it"
            )
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"a flow (process {os.getpid()}, since {time.ctime()})".encode(), 0)
        yield descriptor


def _taken(descriptor: int, path: Path) -> bool:
    """Take the lock; where its holder is dead, wait until that flow's last processes are too."""
    deadline = time.monotonic() + LAST_RITES
    while not filelock.lock_descriptor(descriptor, blocking=False):
        holder = re.search(r"process (\d+)", path.read_text())
        if not holder or psutil.pid_exists(int(holder[1])) or time.monotonic() > deadline:
            return False
        time.sleep(POLL)
    return True


@dataclass(frozen=True)
class Slot:
    """What a stage may use while it runs."""

    name: str
    """For people: "GPU 1", "2 threads"."""

    env: Mapping[str, str]
    """What the stage's environment needs, so that it stays on its slot."""

    descriptors: Sequence[int]
    """The locks; hand them to the stage's process."""


@dataclass(frozen=True)
class Slots:
    """The GPUs and CPU threads of this machine, shared by all its flows."""

    folder: Path
    gpus: tuple[str, ...]
    """As CUDA_VISIBLE_DEVICES names them."""

    threads: int

    @contextlib.contextmanager
    def take(self, *, threads: int, gpu: bool, stop: threading.Event) -> Iterator[Slot]:
        """Wait for a slot: one GPU if a GPU helps and there are any, else `threads` CPU threads.

        Raises:
            Stopped: `stop` was set before a slot was free.
        """
        on_gpu = gpu and bool(self.gpus)
        names = [f"gpu-{each}" for each in self.gpus] if on_gpu else _numbered(self.threads)
        wanted = 1 if on_gpu else max(1, min(threads, self.threads))
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        while not stop.is_set():
            with contextlib.ExitStack() as held:
                taken = self._take(names, wanted, held)
                if len(taken) == wanted:
                    yield _slot(taken) if on_gpu else _threads(taken)
                    return
            stop.wait(POLL)
        raise Stopped

    def _take(self, names: list[str], wanted: int, held: contextlib.ExitStack) -> dict[str, int]:
        """Take up to `wanted` of `names`, one taker at a time: two that each want both of two
        threads must not end up with one each.
        """
        taken: dict[str, int] = {}
        with _opened(self.folder / "door") as door:
            filelock.lock_descriptor(door)
            for name in names:
                with contextlib.ExitStack() as attempt:
                    descriptor = attempt.enter_context(_opened(self.folder / name))
                    if filelock.lock_descriptor(descriptor, blocking=False):
                        taken[name] = descriptor
                        held.push(attempt.pop_all())
                if len(taken) == wanted:
                    break
        return taken


def slots() -> Slots:
    """This machine's slots.  KD_CPUS says how many threads there are, where the count is wrong.

    Raises:
        ValueError: KD_CPUS is no whole number of 1 or more.
    """
    threads = os.environ.get("KD_CPUS") or str(_cpus())
    if not threads.isdecimal() or int(threads) < 1:
        raise ValueError(f"KD_CPUS is {threads!r}; it must be a whole number of 1 or more")
    return Slots(
        folder=Path(tempfile.gettempdir()) / f"kd-slots-{os.getuid()}",
        gpus=_gpus(),
        threads=int(threads),
    )


def _cpus() -> int:
    """The CPUs this process may use; macOS knows only those that there are."""
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


def _numbered(threads: int) -> list[str]:
    return [f"thread-{number}" for number in range(threads)]


def _slot(taken: dict[str, int]) -> Slot:
    ((name, descriptor),) = taken.items()
    gpu = name.removeprefix("gpu-")
    return Slot(f"GPU {gpu}", {"CUDA_VISIBLE_DEVICES": gpu}, [descriptor])


def _threads(taken: dict[str, int]) -> Slot:
    plural = "s" if len(taken) > 1 else ""
    return Slot(f"{len(taken)} thread{plural}", {}, list(taken.values()))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
