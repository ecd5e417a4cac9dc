"""One run a comparison, one process a unit: locks that the kernel frees when their holder dies."""

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
        path: Its file, which stays.
        does: What its holder does, for whoever is refused: "works in ...".

    Raises:
        Refused: another process holds it; the message says which.
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
