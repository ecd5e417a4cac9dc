"""The Prefect flow of a comparison: each remaining unit is a task, run in its own process.

    python -m flows.compare params.compare.yaml

`python -m kd.compare` does the same work without Prefect, and faster if units are short, since
its processes import PyTorch only once.  Deployments use `flows/compare_flow.py:compare`.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

from flows import child, locks, server

COMMAND = (sys.executable, "-m", "kd.compare")


class UnitFailedError(Exception):
    """A unit of the comparison failed; the message ends with its last output lines."""


def left(file: str, root: Path) -> dict[str, list[str]]:
    """The remaining units in topological order, each with the units it depends on.

    Raises:
        ValueError: the file is not a valid comparison; the message says why.
    """
    listed = subprocess.run(
        [*COMMAND, file, "--list"], cwd=root, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        raise ValueError(listed.stderr.strip())
    found: dict[str, list[str]] = json.loads(listed.stdout)
    return found


def do(file: str, root: Path, unit: str, stop: threading.Event) -> None:
    """Wait for a slot and run one unit on it."""
    lines: list[str] = []
    with locks.slots().take(threads=1, gpu=True, stop=stop) as slot:
        code = child.run(
            [*COMMAND, file, "--unit", unit],
            cwd=root,
            env={**os.environ, **slot.env},
            hear=lines.append,
            stop=stop,
            hold=slot.descriptors,
        )
    if code:
        raise UnitFailedError("\n".join([f"{unit} ended with exit code {code}", *lines[-15:]]))


def main() -> int:
    """Run what is left of a comparison, on the user's Prefect server or on one started here."""
    parser = argparse.ArgumentParser(prog="python -m flows.compare", description=main.__doc__)
    parser.add_argument("file", help="such as params.compare.yaml")
    given = parser.parse_args()
    root = Path.cwd()
    server.configure(root)
    if not os.environ.get("PREFECT_API_URL"):
        server.Server(root).wait()
    from flows.compare_flow import compare

    return 0 if compare(given.file, return_state=True).is_completed() else 1


if __name__ == "__main__":
    sys.exit(main())
