"""Locks: one run per comparison, one process per unit; the kernel frees them if a holder dies."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout  # PyTorch itself needs it

from kd.component import Refused


@contextlib.contextmanager
def held(path: Path, does: str) -> Iterator[None]:
    """Hold a lock.

    Args:
        path: The lock file, which is not removed.
        does: What the holder does, for the message of a refusal: "works in ...".

    Raises:
        Refused: another process holds it; the message names that process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(path).acquire(timeout=0)
    except Timeout:
        holder = path.read_text() or "another process"
        raise Refused(f"{holder} {does}: wait for it, or stop it") from None
    with lock:
        path.write_text(f"a comparison (process {os.getpid()}, since {time.ctime()})")
        yield
