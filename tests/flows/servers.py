"""Real servers that a test may kill and start again at the same address, on the same data."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from flows import server
from tests.flows.toys import wait_until


class Server:
    """A server program on a free port of this machine."""

    def __init__(self, home: Path, health: str, command: Callable[[int], list[str]]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = int(probe.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.home, self.health, self.command = home, health, command(self.port)
        self.start()

    def start(self) -> None:
        with (self.home / "server.log").open("a") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.home,
                env={
                    **os.environ,
                    "PREFECT_HOME": str(self.home),
                    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
                    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
                },
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_until(lambda: server.answers(f"{self.url}{self.health}"))

    def close(self) -> None:
        """At the end of a test."""
        self.kill()

    def kill(self) -> None:
        """As a power cut would."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def prefect(home: Path) -> Server:
    application = ["--factory", "prefect.server.api.server:create_app", "--log-level", "error"]
    command = [sys.executable, "-m", "uvicorn", *application, "--port"]
    return Server(home, "/api/health", lambda port: [*command, str(port)])


def mlflow(home: Path) -> Server:
    store = ["--backend-store-uri", f"sqlite:///{home}/server.db"]
    files = ["--artifacts-destination", str(home / "files")]
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", *store, *files]
    return Server(home, "/health", lambda port: [*command, "--port", str(port)])
