"""The recorder: one process per store and machine that writes every stage's run to MLflow.

The first stage starts it; it exits after a minute without any connection.  The stage opens the
listening socket and passes it on, so that stages can connect while the recorder still imports
MLflow.
"""

import errno
import fcntl
import hashlib
import os
import re
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from kd.tracking.wire import Line

if TYPE_CHECKING:
    from kd.tracking.store import Session, Store

IDLE_SECONDS = 60.0
"""How long it waits for the next stage; KD_RECORDER_IDLE overrides it."""
OUTAGE_SECONDS = 300.0
"""How long a store may be unreachable before a run is given up; KD_RECORDER_OUTAGE overrides."""
QUESTIONS = ("registered", "champion", "fetch", "promote")
"""Messages that are answered, besides a run's start and end."""
OWN_ENVIRONMENT = ("MLFLOW_", "AWS_", "GOOGLE_", "AZURE_", "KD_RECORDER_")
"""Prefixes of variables that affect access to a store: if they change, a new recorder starts."""


# The stage's side.


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


def sqlite_path(uri: str) -> Path | None:
    """The file of a SQLite store, None for any other store."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def without_password(uri: str) -> str:
    """The URI without user name and password, to be shown."""
    return re.sub(r"//[^/@]*@", "//", uri)


def _connected(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(path))
    except OSError:
        connection.close()
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


# The recorder's side.


def serve(path: Path, uri: str, root: Path) -> None:
    """Serve every stage that connects, one thread each, until none has for IDLE_SECONDS.

    Args:
        path: The socket's path; standard input is the listening socket.
        uri: The store.
        root: The repository.
    """
    listener = socket.socket(fileno=os.dup(sys.stdin.fileno()))
    listener.settimeout(float(os.environ.get("KD_RECORDER_IDLE", IDLE_SECONDS)))
    try:
        from kd.tracking.store import Store

        store: Store | Refusal = Store(uri, root)
    except Exception as error:
        store = Refusal(error)
        listener.settimeout(0.1)
    sessions: list[threading.Thread] = []
    while True:
        try:
            sessions.append(_answer(listener, store))
        except TimeoutError:
            sessions = [session for session in sessions if session.is_alive()]
            if not sessions:
                break
    with locked(path.with_suffix(".lock")):
        path.unlink(missing_ok=True)  # from here on, a stage starts a new recorder
        listener.settimeout(0)
        with suppress(BlockingIOError):
            while True:
                _answer(listener, store)


class Refusal:
    """Stands in for a store that could not be opened: gives waiting stages the reason."""

    def __init__(self, reason: Exception) -> None:
        """Args: reason: What went wrong."""
        self.reason = reason

    def begin(self, start: dict[str, Any]) -> "Session":
        """Raise the reason."""
        raise self.reason


def _answer(listener: socket.socket, store: "Store | Refusal") -> threading.Thread:
    """Wait for a stage to connect; returns the thread that serves it."""
    connection, _ = listener.accept()
    connection.settimeout(None)
    session = threading.Thread(target=_record, args=(Line(connection), store))
    session.start()
    return session


def _record(line: Line, store: "Store | Refusal") -> None:
    """Record one stage's run, from its first message to its last or to the stage's death."""
    try:
        message = line.receive()
    except (OSError, ValueError):
        return  # the stage only wanted to start the recorder
    try:
        session = store.begin(message)
    except Exception as error:
        _say(line, {"error": _brief(error)})
        return
    _say(line, {"run_id": session.run_id, "url": session.url})
    mail: SimpleQueue[dict[str, Any]] = SimpleQueue()
    threading.Thread(target=_listen, args=(line, mail, session.pid)).start()
    lost: str | None = None
    while (message := mail.get())["do"] != "end":
        if message["do"] in QUESTIONS:
            _say(line, {"error": lost} if lost else _answered(session, message))
        elif lost is None:
            lost = _attempt(session, message)
    if lost:
        _attempt(session, {"do": "tags", "tags": {"kd.incomplete": lost}}, patient=False)
    unended = _attempt(session, message, patient=lost is None)
    _say(line, {"error": lost or unended})
    line.close()


def _listen(line: Line, mail: "SimpleQueue[dict[str, Any]]", pid: int) -> None:
    """Queue a stage's messages as they come, so that training never waits for the store."""
    message: dict[str, Any] = {"do": ""}
    try:
        while message["do"] != "end":
            mail.put(message := line.receive())
    except (OSError, ValueError):
        reason = f"process {pid} disappeared: it was killed or crashed"
        mail.put({"do": "end", "status": "KILLED", "reason": reason})


def _attempt(session: "Session", message: dict[str, Any], patient: bool = True) -> str | None:
    """Carry out a message, retrying once after an outage; returns the reason if it failed.

    Writing the same point, tag or file twice is harmless.
    """
    patience = float(os.environ.get("KD_RECORDER_OUTAGE", OUTAGE_SECONDS)) if patient else 0.0
    lost = _try(session, message)
    if lost and patience and session.store.answers(patience):
        session.resume()
        lost = _try(session, message)
    return lost


def _try(session: "Session", message: dict[str, Any]) -> str | None:
    try:
        session.do(**message)
    except Exception as error:
        return f"{message['do']}: {_brief(error)}"
    return None


def _answered(session: "Session", message: dict[str, Any]) -> dict[str, Any]:
    """The answer to a question, or the reason for none; retries once after an outage."""
    patience = float(os.environ.get("KD_RECORDER_OUTAGE", OUTAGE_SECONDS))
    for _ in range(2):
        try:
            return {"answer": session.answer(**message)}
        except Exception as error:
            failed = f"{message['do']}: {_brief(error)}"
            if not session.store.answers(patience):
                break
    return {"error": failed}


def _say(line: Line, message: dict[str, Any]) -> None:
    with suppress(OSError):
        line.send(message)


def _brief(error: Exception) -> str:
    import traceback

    traceback.print_exception(error)  # to the recorder's log
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:500]
