"""`python -m flows.worker POOL`: serve a Prefect work pool from this clone, one stage at a time.

It needs PREFECT_API_URL, a DVC remote in the clone's configuration, and a clone that nobody works
in, because each stage's commit and inputs are checked out there (flows/remote_stage.py).
"""

import argparse
import os
import platform
import signal
import sys
from pathlib import Path

import filelock

from flows import server
from kd import git


def main() -> int:
    """Become a Prefect worker; Ctrl-C or SIGTERM ends it, and another one takes over its stage."""
    parser = argparse.ArgumentParser(prog="python -m flows.worker", description=main.__doc__)
    parser.add_argument("pool", help="gpu, or cpu for stages that do not need a GPU")
    given = parser.parse_args()
    root = Path.cwd()
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "INFO")
    server.configure(root)
    if refusal := _refusal(root):
        print(f"error: {refusal}", file=sys.stderr)
        return 1
    os.environ["KD_CLONE"] = str(root)
    # A stage's process starts in one of Prefect's folders, but must import the code in use here.
    sources = str(Path(__file__).parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [sources, os.environ.get("PYTHONPATH")])
    )
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` leaves it ignored
    command = ["prefect", "worker", "start", "--pool", given.pool, "--type", "process"]
    command += ["--limit", "1", "--name", f"{platform.node()}{root}".replace("/", ".")]
    return os.execv(sys.executable, [sys.executable, "-m", *command])


def _refusal(root: Path) -> str | None:
    """Why this folder cannot serve; None if it can, in which case this process holds its lock."""
    api = os.environ.get("PREFECT_API_URL")
    if not api or not server.answers(f"{api}/health"):
        return f"PREFECT_API_URL is {api or 'not set'}: set it to a Prefect server that answers"
    if not (root / "dvc.yaml").exists() or git.state(root) is None:
        return (
            "a worker runs in a clone of the project that `git status` accepts, in the folder "
            "that holds dvc.yaml"
        )
    if changed := "\n".join(git.changed(root)):
        return (
            "a worker checks out other commits, which would overwrite uncommitted changes here; "
            f"give it a clone of its own:\n{changed}"
        )
    (root / ".kd").mkdir(exist_ok=True)
    descriptor = os.open(root / ".kd" / "worker.lock", os.O_RDWR | os.O_CREAT, 0o600)
    os.set_inheritable(descriptor, True)  # the lock survives the exec
    if not filelock.lock_descriptor(descriptor, blocking=False):
        return "another worker is running in this clone; each needs its own"
    return None


if __name__ == "__main__":
    sys.exit(main())
