"""A temporary Prefect server for one run, where the user runs none.

Prefect could start one by itself, but allows only 20 seconds for it, which the migrations of a
fresh database alone can take, and it drops the last events when it stops.
"""

import atexit
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.request import getproxies_environment, proxy_bypass

from flows import child

PAGES = "http://127.0.0.1:4200"
"""Where `make ui` later shows the runs that a temporary server recorded."""
STARTUP_SECONDS = 120
"""A fresh database takes 25 s on two slow cores."""

HEARTBEAT = "30"
"""Seconds between a flow's heartbeats, the shortest that Prefect allows.

After 90 seconds without one, infra/automations.yaml marks the flow run as crashed.
"""


class NoServerError(Exception):
    """No Prefect server answers."""


def configure(root: Path) -> None:
    """Set Prefect's environment variables before it is imported, unless the user has set them.

    They keep its data in the project, and send its logs to the server, not to the terminal.  And
    no proxy is asked for servers on this machine.
    """
    bypass_proxy()
    for key, value in {
        "PREFECT_HOME": str(root / ".kd" / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "true",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": HEARTBEAT,
        # Prefect's default lets every web page open in a browser here read and change everything.
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"{PAGES},http://localhost:4200",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        "PREFECT_LOGGING_HANDLERS_DEBUG_LEVEL": "CRITICAL",
    }.items():
        os.environ.setdefault(key, value)


def bypass_proxy() -> None:
    """Have this process and its children reach servers on this machine without a proxy."""
    environ = os.environ
    if getproxies_environment() and not proxy_bypass("127.0.0.1"):
        own = environ.get("no_proxy") or environ.get("NO_PROXY") or ""
        environ["no_proxy"] = ",".join(filter(None, [own, "127.0.0.1", "localhost"]))
        environ["NO_PROXY"] = environ["no_proxy"]  # which one counts depends on the program


def answers(address: str) -> bool:
    """Whether a server answers at `address` within three seconds."""
    try:
        with urllib.request.urlopen(address, timeout=3):
            return True
    except urllib.error.HTTPError:
        return True  # such as one that asks for a login, which the client has
    except OSError:
        return False


class Server:
    """A Prefect server on a free local port, which ends with this process."""

    def __init__(self, root: Path) -> None:
        """Start it, and point this process's Prefect client at it.

        Startup takes seconds: do other work first, then `wait`.
        """
        home = Path(os.environ["PREFECT_HOME"])
        home.mkdir(parents=True, exist_ok=True)
        self.log = home / "server.log"
        port = free_port()
        self.api = f"http://127.0.0.1:{port}/api"
        # What `prefect server start` runs, without the UI and the 2 s that its CLI takes.
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
                env={
                    **os.environ,
                    "PREFECT_UI_ENABLED": "0",
                    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "ERROR",  # why it did not start
                },
                output=log,
            )
        os.environ["PREFECT_API_URL"] = self.api
        os.environ.setdefault("PREFECT_UI_URL", PAGES)
        # Registered before Prefect is imported, so it runs after Prefect has sent its last events.
        atexit.register(child.end, self.process)

    def wait(self) -> None:
        """Return once it answers; see `wait`."""
        wait("Prefect's server", f"{self.api}/health", self.process, self.log)


def wait(name: str, address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return once a server that was just started answers at `address`.

    Raises:
        NoServerError: it ended, or did not answer in time; the message has its last lines.
    """
    deadline = time.monotonic() + STARTUP_SECONDS
    while not answers(address):
        if process.poll() is not None or time.monotonic() > deadline:
            last = "\n".join(log.read_text().splitlines()[-5:])
            raise NoServerError(f"{name} did not start ({log}):\n{last}")
        time.sleep(0.1)


def taken(port: int) -> bool:
    """Whether some program listens on a local port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    """A local port that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
