"""The recorder: one process for each store and machine that writes every stage's run to MLflow.

The first stage starts it; it leaves by itself when it has had no connection for a minute.  The
stage opens the listening socket and hands it over, so that it can be talked to at once, while it
still imports MLflow.
"""

import fcntl
import hashlib
import os
import re
import socket
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
"""How long it waits for the next stage; KD_RECORDER_IDLE sets another number."""
OUTAGE_SECONDS = 300.0
"""How long a store may be away before a record is given up; KD_RECORDER_OUTAGE sets another."""
QUESTIONS = ("registered", "champion", "fetch", "promote")
"""What a stage waits for, beside its run's beginning and end."""
OWN_ENVIRONMENT = ("MLFLOW_", "AWS_", "GOOGLE_", "AZURE_", "KD_RECORDER_")
"""Variables by which a store is reached: a change of them calls for another recorder."""


# The stage's side.


def connect(uri: str, root: Path) -> Line:
    """A line to the recorder of a store, which is started where there is none.

    Args:
        uri: The store, as MLflow writes it.
        root: The repository whose commit and dvc.lock are noted.

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
    """Whether a process answers at a socket; one that was killed leaves its file behind."""
    try:
        _connected(path).close()
    except (FileNotFoundError, ConnectionRefusedError):
        return False
    return True


def sqlite_path(uri: str) -> Path | None:
    """The file of a SQLite store, None for any other store."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def without_password(uri: str) -> str:
    """A URI that may be shown."""
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
    """Listen on `path` and start a recorder that answers there, in a session of its own.

    Its own session, because what cancels a stage kills the stage's process group, and somebody
    has to be left to write that down.

    Raises:
        OSError: it ended at once; the message says what it said last.
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
        *_, last = ["no word", *said.read_text(errors="replace").splitlines()]
        raise OSError(
            f"its recorder ended at once, with status {started.returncode} ({last}; see {said})"
        )


def folder() -> Path:
    """Where this user's recorders have their sockets, locks and logs; nobody else may enter.

    In the system's temporary folder, because a socket's path has room for 100 characters only.
    """
    own = Path(tempfile.gettempdir()) / f"kd-{os.getuid()}"
    own.mkdir(mode=0o700, exist_ok=True)
    if own.stat().st_uid != os.getuid():
        raise PermissionError(f"{own} belongs to another user")
    return own


def _key(uri: str, root: Path) -> str:
    """Tells recorders apart: by store, repository, interpreter, code, and ways in.

    A SQLite file counts by its inode as well: one that was deleted and made anew is another.
    """
    path = sqlite_path(uri)
    own = sorted(item for item in os.environ.items() if item[0].startswith(OWN_ENVIRONMENT))
    code = [source.read_bytes() for source in sorted(Path(__file__).parent.glob("*.py"))]
    return digest((uri, path and path.stat().st_ino, str(root), sys.executable, own, code))


def digest(identity: object) -> str:
    """A short name for something."""
    return hashlib.sha256(repr(identity).encode()).hexdigest()[:16]


def _environment(uri: str) -> dict[str, str]:
    """The recorder's: kd importable from any folder, patience short, nobody phoned.

    The store's URI is here and not among the arguments, which everybody on the machine can read.
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
    """Hold a lock that all processes of this machine respect, and that dies with its holder."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# The recorder's side.


def serve(path: Path, uri: str, root: Path) -> None:
    """Serve every stage that connects, a thread each, until none has for IDLE_SECONDS.

    Args:
        path: Where the socket lies that standard input listens on.
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
        path.unlink(missing_ok=True)  # from here on, a stage starts a recorder of its own
        listener.settimeout(0)
        with suppress(BlockingIOError):
            while True:
                _answer(listener, store)


class Refusal:
    """Stands for a store that cannot be opened: says why to whoever waits, and is gone."""

    def __init__(self, reason: Exception) -> None:
        """Args: reason: What went wrong."""
        self.reason = reason

    def begin(self, start: dict[str, Any]) -> "Session":
        """Refuse."""
        raise self.reason


def _answer(listener: socket.socket, store: "Store | Refusal") -> threading.Thread:
    """Wait for a stage to connect; the thread that serves it."""
    connection, _ = listener.accept()
    connection.settimeout(None)
    session = threading.Thread(target=_record, args=(Line(connection), store))
    session.start()
    return session


def _record(line: Line, store: "Store | Refusal") -> None:
    """Write down one stage's run, from its first word to its last or to its death."""
    try:
        message = line.receive()
    except (OSError, ValueError):
        return  # it only wanted a recorder to be there
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
    """Take in what a stage says as it comes: no training waits for a store that is away."""
    message: dict[str, Any] = {"do": ""}
    try:
        while message["do"] != "end":
            mail.put(message := line.receive())
    except (OSError, ValueError):
        reason = f"process {pid} ended without a word; it was killed or crashed"
        mail.put({"do": "end", "status": "KILLED", "reason": reason})


def _attempt(session: "Session", message: dict[str, Any], patient: bool = True) -> str | None:
    """Do what a message says, once more if the store was away; the reason if that failed.

    A store takes the same point, tag or file twice without harm.
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
    """The answer to a question, asked once more if the store was away, or why there is none."""
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
