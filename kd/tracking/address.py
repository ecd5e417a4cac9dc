"""Which store runs are written to, and whether it can be reached."""

import logging
import os
import re
import socket
import time
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from kd.component import ConfigError

log = logging.getLogger(__name__)

PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
"""Default port of each kind of store, if its URI has none."""
REACHABLE_WITHIN = 3.0
"""Seconds within which a tracking server must accept a connection before a stage starts."""
BACK_WITHIN = 120.0
"""Seconds that a flow's stage retries, so that a restarting server does not end the flow."""
BETWEEN_KNOCKS = 5.0


class TrackingError(ConfigError):
    """MLflow cannot be used; the message names the store and the remedy."""

    def __init__(self, uri: str, reason: object) -> None:
        """Args: the store's URI, and what went wrong."""
        super().__init__(
            f"MLflow at {without_password(uri)} cannot be used: {reason}. Start it, "
            "set MLFLOW_TRACKING_URI, or turn tracking off with `tracking: false` in params.yaml"
        )


def tracking_uri() -> str:
    """The store's URI: MLFLOW_TRACKING_URI, or a SQLite file in this repository's .kd folder."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        return f"sqlite:///{repository() / '.kd' / 'mlflow.db'}"
    if path := sqlite_path(uri):
        return f"sqlite:///{repository() / path}"
    return uri


def prepare_store() -> str:
    """Check that the store can be reached, create a SQLite store's file; returns the store's URI.

    The tables are created once, by the first recorder, under a lock.

    Raises:
        TrackingError: MLflow is not installed, the server cannot be reached (3 s per attempt;
            a flow's stage retries for 120 s), or the file cannot be written.
    """
    uri = tracking_uri()
    if find_spec("mlflow") is None:
        raise TrackingError(uri, "mlflow is not installed (pip install 'kd[pipeline]')")
    try:
        if path := sqlite_path(uri):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        else:
            _knock(uri)
    except OSError as error:
        raise TrackingError(uri, error) from error
    return uri


def repository() -> Path:
    """The repository's root: the nearest folder upwards that has a dvc.yaml or .git."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "dvc.yaml").exists() or (folder / ".git").exists():
            return folder
    return here


def sqlite_path(uri: str) -> Path | None:
    """The file of a SQLite store, None for any other store."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def without_password(uri: str) -> str:
    """The URI without user name and password, to be shown."""
    return re.sub(r"//[^/@]*@", "//", uri)


def _knock(uri: str) -> None:
    """Open a connection to a server and close it again; raise OSError if that fails.

    A flow's stage retries an unreachable server, but not one whose host name does not resolve.
    """
    parts = urlsplit(uri)
    port = parts.port or PORTS.get(parts.scheme.partition("+")[0])
    until = time.monotonic() + (BACK_WITHIN if os.environ.get("KD_FLOW_RUN_ID") else 0)
    while parts.hostname and port:
        try:
            socket.create_connection((parts.hostname, port), REACHABLE_WITHIN).close()
        except OSError as error:
            if isinstance(error, socket.gaierror) or time.monotonic() >= until:
                raise
            where = f"{parts.hostname}:{port}"
            log.warning(
                "MLflow at %s is unreachable: retrying for %.0f s", where, until - time.monotonic()
            )
            time.sleep(BETWEEN_KNOCKS)
        else:
            break
