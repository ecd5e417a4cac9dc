"""An Optuna journal file for fast objectives: one write per generation."""

import contextlib
import itertools
import json
import os
import weakref
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from optuna.storages.journal import BaseJournalBackend, JournalFileBackend
from optuna.trial import TrialState

ATTRIBUTES = frozenset({"user_attr", "system_attr", "user_attrs", "system_attrs"})
"""Keys of journal lines that hold objects from users."""

START = b'{"op_code":'
"""How every journal line starts."""

_encode = json.JSONEncoder(separators=(",", ":")).encode


class GenerationJournalBackend(BaseJournalBackend):
    """A journal file written once per generation instead of once per operation.

    The file is a plain Optuna journal: `JournalFileBackend` and optuna-dashboard can read it.
    Trials that a killed process had not written are lost; resuming evaluates them again, in one
    thread bit-identically.  fsync runs while the next generation is computed, so a power failure
    may cost two generations.  An unfinished trial at the end of the file is dropped when the file
    is opened again.

    Only one process may write at a time.  A second `GenerationJournalBackend` is refused where
    the system has flock; Optuna's own backend takes no notice of that lock: let it only read.

        with GenerationJournalBackend("study.log") as backend:
            study = optuna.create_study(storage=optuna.storages.JournalStorage(backend), ...)

    Args:
        path: the journal file; created if it does not exist, else continued.
        trials_per_commit: finished trials that are written together.

    Raises:
        RuntimeError: another process has locked the file.
        ValueError: the file is not an Optuna journal; it is left as it is.
    """

    def __init__(self, path: str | os.PathLike[str], trials_per_commit: int = 20) -> None:
        if trials_per_commit < 1:
            raise ValueError(f"trials_per_commit is {trials_per_commit}; it must be at least 1")
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            _lock_or_refuse(descriptor, path)
            _cut_open_trial(descriptor, path)
        except BaseException:
            os.close(descriptor)
            raise
        self._reader = JournalFileBackend(os.fspath(path))
        self._trials_per_commit = trials_per_commit
        self._finished = 0
        # Logs from number `_first` on are kept in memory: those of the last commit, which the
        # storage reads back, then those that are pending.
        self._first = sum(1 for _ in self._reader.read_logs(0))
        self._num_committed = 0
        self._recent: list[dict[str, Any]] = []
        self._file = _GroupedFile(descriptor)
        # Runs at close(), or when this is garbage-collected or the interpreter exits.
        self._close = weakref.finalize(self, self._file.close)

    def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
        """Logs from the file, then those not written yet."""
        if log_number_from >= self._first:
            return self._recent[log_number_from - self._first :]
        written = self._reader.read_logs(log_number_from)
        return itertools.chain(written, self._recent[self._num_committed :])

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Queue logs; write them once enough trials have finished.

        Raises:
            ValueError: the journal is closed.
            OSError: see `commit`.
        """
        self._raise_if_closed()
        for log in logs:
            line = _encode(log)
            self._file.pending.append(line)
            # Users may change attributes later: keep them as the file will have them.
            self._recent.append(log if ATTRIBUTES.isdisjoint(log) else json.loads(line))
            self._finished += _finishes_trial(log)
        if self._finished >= self._trials_per_commit:
            self.commit()

    def commit(self) -> None:
        """Write what is pending: one write, one fsync.

        Raises:
            ValueError: the journal is closed.
            OSError: the disk is full, or the previous commit's fsync failed.
        """
        self._raise_if_closed()
        self._file.commit()
        del self._recent[: self._num_committed]
        self._first += self._num_committed
        self._num_committed = len(self._recent)
        self._finished = 0

    def close(self) -> None:
        """Write what is pending and release the file."""
        self._close()

    def _raise_if_closed(self) -> None:
        """Another file may have our descriptor's number by now."""
        if not self._close.alive:
            raise ValueError("the journal is closed: open it again to go on with the study")

    def __enter__(self) -> "GenerationJournalBackend":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _cut_open_trial(descriptor: int, path: object) -> None:
    """Drop an incomplete line or trial that a killed process left at the end.

    Since there is only one writer, no other process can still finish it.

    Raises:
        ValueError: the file is not a journal.
    """
    with open(descriptor, "rb", closefd=False) as file:
        lines = file.readlines()
    if lines and lines[0][: len(START)] != START[: len(lines[0])]:
        raise ValueError(f"{path} is not an Optuna journal: give the study another file")
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    while lines and _leaves_trial_open(json.loads(lines[-1])):
        lines.pop()
    os.ftruncate(descriptor, sum(map(len, lines)))


def _leaves_trial_open(log: dict[str, Any]) -> bool:
    """Whether a journal line starts or updates a trial that is neither finished nor waiting."""
    if log.get("state") == TrialState.WAITING:
        return False
    return ("trial_id" in log or "datetime_start" in log) and not _finishes_trial(log)


def _finishes_trial(log: dict[str, Any]) -> bool:
    """Whether a journal line finishes a trial, or adds a finished one."""
    return log.get("state") is not None and TrialState(log["state"]).is_finished()


class _GroupedFile:
    """Appends lines in groups; fsync of one runs while the next is computed.

    Args:
        descriptor: the file, opened for appending; `close` closes it.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.pending: list[str] = []
        self._disk = ThreadPoolExecutor(1)
        self._synced: Future[None] | None = None

    def commit(self) -> None:
        """Append what is pending; if the disk is full, write nothing, so it can be retried."""
        self._append()
        self._synced = self._disk.submit(os.fsync, self._descriptor)

    def close(self) -> None:
        """Append what is pending, wait for the disk, and close the file."""
        try:
            self._append()
            os.fsync(self._descriptor)  # not in a thread: none can start at interpreter exit
        finally:
            self._disk.shutdown()
            _unlock(self._descriptor)
            os.close(self._descriptor)

    def _append(self) -> None:
        if self._synced is not None:
            synced, self._synced = self._synced, None
            synced.result()
        size = os.fstat(self._descriptor).st_size
        content = memoryview("".join(f"{line}\n" for line in self.pending).encode())
        try:
            while content:
                content = content[os.write(self._descriptor, content) :]
        except OSError:
            os.ftruncate(self._descriptor, size)
            raise
        self.pending.clear()


def _lock_or_refuse(descriptor: int, path: object) -> None:
    """Lock the file until it is closed or the process dies; without flock, trust the caller."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RuntimeError(f"{path}: another process is writing this journal") from error
    except (ImportError, OSError):  # Windows, and network disks without locks
        return


def _unlock(descriptor: int) -> None:
    """Give up the lock, which a process forked meanwhile would keep beyond our close."""
    with contextlib.suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_UN)
