"""Reach this machine's recorder for a store, and start it if there is none.

The stage opens the listening socket and passes it on, so that stages can connect while the
recorder still imports MLflow.
"""

import errno
import fcntl
import hashlib
import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kd.tracking.address import sqlite_path
from kd.tracking.wire import Line

OWN_ENVIRONMENT = ("MLFLOW_", "AWS_", "GOOGLE_", "AZURE_", "KD_RECORDER_")
"""Prefixes of variables that affect access to a store: if they change, a new recorder starts."""


def connect(uri: str, root: Path) -> Line:
    """Connect to a store's recorder; start it if there is none.

    Args:
        uri: The store's URI in MLflow's format.
        root: The repository whose commit and dvc.lock are recorded.

    Raises:
        OSError: it cannot be started.
    """
    path = folder() / f"{_key(uri, root)}.sock"
    with locked(path.with_suffix(".lock")):
        try:
            connection = _connected(path)
        except (FileNotFoundError, ConnectionRefusedError):
            _start(path, uri, root)
            connection = _connected(path)
    return Line(connection)


def listens(path: Path) -> bool:
    """Whether a process listens on a socket; one that was killed leaves the file behind."""
    try:
        _connected(path).close()
    except (FileNotFoundError, ConnectionRefusedError):
        return False
    return True


def _connected(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(path))
    except OSError as error:
        connection.close()
        if error.errno is None:  # Python's own "AF_UNIX path too long"
            raise OSError(f"{error}; set TMPDIR to a shorter folder than {path.parent}") from None
        raise
    return connection


def _start(path: Path, uri: str, root: Path) -> None:
    """Listen on `path` and start a recorder that answers there, in a new session.

    It needs its own session because cancelling a stage kills the stage's process group, and the
    recorder must survive to record that.

    Raises:
        OSError: it exited at once; the message has the last line of its output.
    """
    path.unlink(missing_ok=True)
    said = path.with_suffix(".log")
    with socket.socket(socket.AF_UNIX) as listener, said.open("wb") as log:
        listener.bind(str(path))
        listener.listen(128)
        started = subprocess.run(
            [sys.executable, "-m", "kd.tracking", str(path), str(root)],
            stdin=listener.fileno(),
            stdout=log,
            stderr=log,
            cwd=root,
            start_new_session=True,
            env=_environment(uri),
            check=False,
        )
    if started.returncode:
        *_, last = ["no output", *said.read_text(errors="replace").splitlines()]
        raise OSError(
            f"its recorder exited at once with status {started.returncode} ({last}; see {said})"
        )


def folder() -> Path:
    """This user's private folder for the recorders' sockets, locks and logs, and flows' slots.

    In the system's temporary folder, because a socket's path is limited to about 100 characters.

    Raises:
        PermissionError: another user made it, or made a link there, or could write to it.
    """
    own = Path(tempfile.gettempdir()) / f"kd-{os.getuid()}"
    own.mkdir(mode=0o700, exist_ok=True)
    found = own.lstat()
    private = stat.S_ISDIR(found.st_mode) and not found.st_mode & 0o022
    if not private or found.st_uid != os.getuid():
        raise PermissionError(errno.EACCES, "It is not a folder of this user alone", str(own))
    return own


def _key(uri: str, root: Path) -> str:
    """Identifies a recorder: store, repository, Python, this folder's code, OWN_ENVIRONMENT.

    A SQLite file's inode counts too: one that was deleted and recreated is another store.
    """
    path = sqlite_path(uri)
    own = sorted(item for item in os.environ.items() if item[0].startswith(OWN_ENVIRONMENT))
    code = [source.read_bytes() for source in sorted(Path(__file__).parent.glob("*.py"))]
    return digest((uri, path and path.stat().st_ino, str(root), sys.executable, own, code))


def digest(identity: object) -> str:
    """A short hash of an object's repr, for file names."""
    return hashlib.sha256(repr(identity).encode()).hexdigest()[:16]


def _environment(uri: str) -> dict[str, str]:
    """The recorder's environment: kd importable from anywhere, short timeouts, no telemetry.

    The store's URI is passed here because every user of the machine can read the arguments.
    """
    package_root = str(Path(__file__).resolve().parents[2])
    return {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_UV_AUTO_DETECT": "false",
        **os.environ,
        "MLFLOW_TRACKING_URI": uri,
        "PYTHONPATH": os.pathsep.join(
            part for part in (package_root, os.environ.get("PYTHONPATH")) if part
        ),
    }


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock among all processes of this machine; it is released if the holder dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
