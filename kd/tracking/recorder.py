"""The recorder: one process per store and machine that writes every stage's run to MLflow.

The first stage starts it (kd/tracking/contact.py); it exits after a minute without any connection.
"""

import os
import socket
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from kd.tracking.contact import locked
from kd.tracking.wire import Line

if TYPE_CHECKING:
    from kd.tracking.store import Session, Store

IDLE_SECONDS = 60.0
"""How long it waits for the next stage; KD_RECORDER_IDLE overrides it."""
OUTAGE_SECONDS = 300.0
"""How long a store may be unreachable before a run is given up; KD_RECORDER_OUTAGE overrides."""
QUESTIONS = ("registered", "champion", "fetch", "promote")
"""Messages that are answered, besides a run's start and end."""


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

        store: Store | Exception = Store(uri, root)
    except Exception as error:  # the stages that wait are told
        store = error
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


def _answer(listener: socket.socket, store: "Store | Exception") -> threading.Thread:
    """Wait for a stage to connect; returns the thread that serves it."""
    connection, _ = listener.accept()
    connection.settimeout(None)
    session = threading.Thread(target=_record, args=(Line(connection), store))
    session.start()
    return session


def _record(line: Line, store: "Store | Exception") -> None:
    """Record one stage's run, from its first message to its last or to the stage's death."""
    try:
        message = line.receive()
    except (OSError, ValueError):
        return  # the stage only wanted to start the recorder
    try:
        if isinstance(store, Exception):
            raise store
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
            _say(line, {"error": lost} if lost else _done(session, message))
        elif lost is None:
            lost = _done(session, message).get("error")
    if lost:
        _done(session, {"do": "tags", "tags": {"kd.incomplete": lost}}, patient=False)
    unended = _done(session, message, patient=lost is None).get("error")
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


def _done(session: "Session", message: dict[str, Any], patient: bool = True) -> dict[str, Any]:
    """Carry out a message, twice if there was an outage; the answer, or why there is none.

    Writing the same point, tag or file twice is harmless.
    """
    patience = float(os.environ.get("KD_RECORDER_OUTAGE", OUTAGE_SECONDS))
    for retries in (patient, False):
        try:
            return {"answer": session.do(**message)}
        except Exception as error:
            failed = f"{message['do']}: {_brief(error)}"
        if not (retries and session.store.answers(patience)):
            break
        session.resume()
    return {"error": failed}


def _say(line: Line, message: dict[str, Any]) -> None:
    with suppress(OSError):
        line.send(message)


def _brief(error: Exception) -> str:
    traceback.print_exception(error)  # to the recorder's log
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:500]
