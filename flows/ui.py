"""`python -m flows.ui`: show this project's runs in the browser, in MLflow and Prefect."""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from flows import child, server
from kd import tracking
from kd.tracking import address, views

PAGES = {"Prefect": server.PAGES, "MLflow": "http://127.0.0.1:5000"}
HEALTH = {"Prefect": "/api/health", "MLflow": "/health"}
POLL = 0.5
"""Seconds between polls of the servers."""


def main() -> int:
    """Start both servers, print their addresses, and stop them on Ctrl-C."""
    argparse.ArgumentParser(prog="python -m flows.ui", description=main.__doc__).parse_args()
    root = Path.cwd()
    if not (root / "dvc.yaml").exists():
        raise SystemExit(f"error: no dvc.yaml is in {root}: run from the project's root")
    (root / ".kd").mkdir(exist_ok=True)  # for the logs
    server.configure(root)
    commands = {}
    api = os.environ.pop("PREFECT_API_URL", None)
    if api and server.answers(f"{api}/health"):
        print(f"Prefect: {api.removesuffix('/api')}")  # runs already, and is not ours to stop
    else:
        commands["Prefect"] = [sys.executable, "-m", "prefect", "server", "start"]
    uri = tracking.tracking_uri()
    if uri.startswith(("http://", "https://")):
        print(f"MLflow: {address.without_password(uri)}")
    else:
        # The default takes 14 processes and 3 GB.
        commands["MLflow"] = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
        # No argument, since every user of the machine can read those, and it may hold a password.
        os.environ["MLFLOW_BACKEND_STORE_URI"] = uri
    if not commands:
        return 0
    for name in commands:
        port = urllib.parse.urlsplit(PAGES[name]).port
        if port and server.taken(port):
            raise SystemExit(
                f"error: {name} needs port {port}, which another program uses: stop it (another "
                "clone's `make ui` or `make stack`, say)"
            )
    print(f"starting {' and '.join(commands)}: about 20 s")
    with contextlib.ExitStack() as running, contextlib.suppress(KeyboardInterrupt):
        servers = {}
        for name, command in commands.items():
            servers[name] = _start(root, name, command)
            running.callback(child.end, servers[name])
        for name, process in servers.items():
            try:
                server.wait(name, PAGES[name] + HEALTH[name], process, _log(root, name))
            except server.NoServerError as error:
                raise SystemExit(str(error)) from None
            print(f"{name}: {PAGES[name]}{_first_page() if name == 'MLflow' else ''}")
        print("Ctrl-C stops the servers started here")
        while all(process.poll() is None for process in servers.values()):
            time.sleep(POLL)
        name = next(name for name, process in servers.items() if process.poll() is not None)
        raise SystemExit(f"error: {name} ended; see {_log(root, name)}")
    return 0


def _start(root: Path, name: str, command: list[str]) -> subprocess.Popen[bytes]:
    env = {
        **os.environ,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        # Else a web page could send requests, although not read the answers; clients know this.
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
    }
    with _log(root, name).open("w") as log:
        return child.start(command, cwd=root, env=env, output=log)


def _first_page() -> str:
    """The part of MLflow's URL that shows this project's networks; "" before any run."""
    name = urllib.parse.quote(os.environ.get("MLFLOW_EXPERIMENT_NAME", "kd"))
    ask = f"{PAGES['MLflow']}/api/2.0/mlflow/experiments/get-by-name?experiment_name={name}"
    try:
        with urllib.request.urlopen(ask, timeout=10) as answer:
            return views.address(json.load(answer)["experiment"]["experiment_id"])
    except urllib.error.HTTPError:
        return ""


def _log(root: Path, name: str) -> Path:
    return root / ".kd" / f"{name.lower()}-ui.log"


if __name__ == "__main__":
    sys.exit(main())
