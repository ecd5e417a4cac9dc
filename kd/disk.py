"""Atomic writes, temporary folders, checksums of files and folders, remedies for disk errors."""

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TEMPORARY = "kd-run-"
"""Prefix of temporary folders; the numbers of a namespace and of a process in it follow."""


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling to write to, which replaces `path` if the block succeeds.

    A crash leaves either the old file or the new one, never half a file.
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


def temporary() -> tempfile.TemporaryDirectory[str]:
    """Make a temporary folder, and remove those of processes that were killed."""
    ours = f"{TEMPORARY}{_namespace()}-"
    for left_over in Path(tempfile.gettempdir()).glob(f"{ours}*-*"):
        with suppress(ValueError, OverflowError):  # a name that anybody may have given
            if not lives(int(left_over.name.removeprefix(ours).split("-")[0])):
                shutil.rmtree(left_over, ignore_errors=True)  # another user's stays
    return tempfile.TemporaryDirectory(prefix=f"{ours}{os.getpid()}-", ignore_cleanup_errors=True)


def _namespace() -> int:
    """Tells apart processes of one number, in containers that share a folder; 0 if unknown."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def lives(process: int) -> bool:
    """Whether a process exists on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_of(path: Path) -> list[Path]:
    """The file itself; for a folder, all files in it, sorted by name."""
    if not path.is_dir():
        return [path]
    return sorted((each for each in path.rglob("*") if each.is_file()), key=Path.as_posix)


def digest(path: Path) -> str:
    """SHA-256 of a file; for a folder, of the list that `sha256sum` prints of its files."""
    if not path.is_dir():
        return sha256(path)
    lines = (f"{digest(each)}  {each.relative_to(path).as_posix()}\n" for each in files_of(path))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def num_bytes(path: Path) -> int:
    """The size of a file, or of all files in a folder."""
    return sum(each.stat().st_size for each in files_of(path))


def remove(path: Path) -> None:
    """Remove a file or folder if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def remedy(error: OSError) -> str | None:
    """What went wrong with a file, and what to do; None if the error is an unexpected one."""
    if error.errno in (errno.EACCES, errno.EROFS):
        return f"{error}: change its owner or mode, and run it again"
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or shutil.disk_usage(".").free <= 2**20:  # numpy's errors have no errno
        return f"the disk is full ({error}); no partial file was kept"
    return None
