"""Files: written whole or not at all, and known by their checksum."""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary sibling to write to, which becomes `path` when the block ends well.

    A crash leaves either the old file or the new one, never a half.
    """
    for left_over in path.parent.glob(f".{path.name}.*.tmp"):
        if not lives(int(left_over.suffixes[-2][1:])):  # its process was killed
            left_over.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def lives(process: int) -> bool:
    """Whether a process of this machine is there."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, which is never in memory as a whole."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remedy(error: OSError) -> str | None:
    """What went wrong with a file, and what to do; None where it is nothing that people expect."""
    if error.errno in (errno.EACCES, errno.EROFS):
        return f"{error}: change its owner or mode, and run it again"
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or shutil.disk_usage(".").free <= 2**20:  # numpy's errors have no number
        return f"the disk is full ({error}); nothing half-written was kept"
    return None
