"""A Prefect server for the time of one run, where nobody runs one.

Prefect would start such a server by itself, but gives a fresh database 20 seconds, which its
migrations alone can take, and cuts off the last events when it stops.
"""

import atexit
import os
import socket
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from flows import child

PAGES = "http://127.0.0.1:4200"
"""Where `make ui` shows the runs of a server that lives for one run only."""
STARTUP_SECONDS = 120
"""A fresh database takes 25 s on two slow cores."""

HEARTBEAT = "30"
"""Seconds between a flow's signs of life, the least that Prefect takes.

After 90 without one, infra/automations.yaml takes it for dead.
"""


class NoServerError(Exception):
    """No Prefect server answers."""


def configure(root: Path) -> None:
    """Set Prefect's environment before it is imported; what the user set stays.

    Its data stays in the project, and its log goes to the server instead of the terminal.
    """
    for key, value in {
        "PREFECT_HOME": str(root / ".kd" / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "true",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": HEARTBEAT,
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        "PREFECT_LOGGING_HANDLERS_DEBUG_LEVEL": "CRITICAL",
    }.items():
        os.environ.setdefault(key, value)


def answers(address: str) -> bool:
    """Whether a server answers there, within three seconds."""
    try:
        with urllib.request.urlopen(address, timeout=3):
            return True
    except urllib.error.HTTPError:
        return True  # one that wants a login; the client has it
    except OSError:
        return False


class Server:
    """A server of our own on a free port of this machine, which ends with this process."""

    def __init__(self, root: Path) -> None:
        """Start it, and make it the one that Prefect uses in this process.

        That takes seconds: `wait` when there is nothing else to do.
        """
        home = Path(os.environ["PREFECT_HOME"])
        home.mkdir(parents=True, exist_ok=True)
        self.log = home / "server.log"
        port = free_port()
        self.api = f"http://127.0.0.1:{port}/api"
        # What `prefect server start` runs, without its 2 s of command line and its UI.
        application = "prefect.server.api.server:create_app"
        command = [
            sys.executable,
            "-m",
            "uvicorn",
            "--factory",
            application,
            "--host",
            "127.0.0.1",
        ]
        command += ["--port", str(port), "--log-level", "error"]
        with self.log.open("w") as log:
            self.process = child.start(
                command,
                cwd=root,
                env={**os.environ, "PREFECT_UI_ENABLED": "0"},
                output=log,
            )
        os.environ["PREFECT_API_URL"] = self.api
        os.environ.setdefault("PREFECT_UI_URL", PAGES)
        # Registered before Prefect is imported, so it is called after Prefect's own last words.
        atexit.register(child.end, self.process)

    def wait(self) -> None:
        """Return once it answers.

        Raises:
            NoServerError: it ended, or did not answer in time; the message has its last words.
        """
        deadline = time.monotonic() + STARTUP_SECONDS
        while not answers(f"{self.api}/health"):
            if self.process.poll() is not None or time.monotonic() > deadline:
                last = "\n".join(self.log.read_text().splitlines()[-5:])
                raise NoServerError(f"Prefect's server did not start ({self.log}):\n{last}")
            time.sleep(0.1)


def free_port() -> int:
    """One that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
