"""`python -m flows.pipeline`: bring every stage up to date, and show what came of it.

Nothing of Prefect is imported before it is known that something is to do: its import and its
server cost more than finding out.
"""

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dvc.exceptions import DvcException, NotDvcRepoError
from dvc.scm import SCMError
from rich.console import Console

from flows import child, display, graph, locks, server
from flows.stage import environment


class PipelineStoppedError(Exception):
    """A stage failed, or somebody cancelled the run."""


OURS = (ValueError, PipelineStoppedError, locks.WorkspaceBusyError, server.NoServerError)
"""What is said to people without a traceback."""
INTERRUPTED = 130
"""Exit status after Ctrl-C or SIGTERM, as shells have it."""


def main() -> int:
    """Run what is stale in this folder; 0 when all is up to date in the end."""
    argparse.ArgumentParser(prog="python -m flows.pipeline", description=main.__doc__).parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # both end it in the same order
    root = Path.cwd()
    console = Console()
    complaints = Console(stderr=True, style="bold red", highlight=False, soft_wrap=True)
    try:
        with locks.workspace(root):
            plan = graph.read(root)
        if not plan.reasons:
            console.print(f"Nothing to do: all {len(plan.stages)} stages are up to date.\n")
            display.show_report(root, console)
            return 0
        return run(plan, root, console)
    except (NotDvcRepoError, SCMError) as error:
        complaints.print(
            f"error: {error}: work in a clone of the project, or `git init` and `dvc init` here",
            markup=False,
        )
        return 1
    except (DvcException, *OURS) as error:
        complaints.print(f"error: {error}", markup=False)
        return 1
    except KeyboardInterrupt:
        complaints.print("stopped; what was finished stays, and the next run goes on from there")
        return INTERRUPTED


def run(plan: graph.Plan, root: Path, console: Console) -> int:
    """Run the plan as a Prefect flow, on the user's server or on one of our own.

    Raises:
        flows.server.NoServerError: PREFECT_API_URL does not answer, or our own did not start.
    """
    locks.slots()  # a wrong KD_CPUS is told before anything starts
    display.show_plan(plan, console)
    server.configure(root)
    api = os.environ.get("PREFECT_API_URL")
    if api and not server.answers(f"{api}/health"):
        raise server.NoServerError(
            f"PREFECT_API_URL is {api}, and no Prefect server answers there: "
            "start it, or unset the variable to run without one"
        )
    own = None if api else server.Server(root)
    with warm_process(root):
        with console.status("starting Prefect (half a minute the first time)"):
            from flows.flow import pipeline  # 3 s, while the server starts

            if own:
                own.wait()
        with display.Progress(plan, console):
            state = pipeline(str(root), return_state=True)
    console.print()
    if not state.is_completed():
        raise PipelineStoppedError(state.message or state.name)
    display.show_report(root, console)
    return 0


@contextmanager
def warm_process(root: Path) -> Iterator[None]:
    """Keep a process that has imported torch, from which stages are forked (kd/warm.py)."""
    if os.environ.get("KD_WARM") == "0" or sys.platform != "linux":
        yield
        return
    with tempfile.TemporaryDirectory(prefix="kd-warm-") as folder:
        path = str(Path(folder, "socket"))
        log = (root / ".kd" / "warm.log").open("w")
        command = [sys.executable, "-m", "kd.warm", path]
        with log:
            process = child.start(command, cwd=root, env=environment(), output=log)
        os.environ["KD_WARM_SOCKET"] = path
        try:
            yield
        finally:
            del os.environ["KD_WARM_SOCKET"]
            child.end(process)


if __name__ == "__main__":
    sys.exit(main())
