"""The Prefect flow of a comparison: every unit that is left is a task, in a process of its own.

    python -m flows.compare params.compare.yaml

`python -m kd.compare` does the same work without Prefect, and quicker where units are short, since
its processes import PyTorch once.  For a deployment name `flows/compare_flow.py:compare`.
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
    """A unit of the comparison failed; the message ends with its last lines."""


def left(file: str, root: Path) -> dict[str, list[str]]:
    """The units that are left to do, each with those it needs, in an order that can be followed.

    Raises:
        ValueError: the file is no comparison; the message says why.
    """
    listed = subprocess.run(
        [*COMMAND, file, "--list"], cwd=root, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        raise ValueError(listed.stderr.strip())
    found: dict[str, list[str]] = json.loads(listed.stdout)
    return found


def do(file: str, root: Path, unit: str, stop: threading.Event) -> None:
    """Wait for a slot and do one unit there."""
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
    """Do what is left of a comparison, on the user's Prefect server or on one of our own."""
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
