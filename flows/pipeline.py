"""`python -m flows.pipeline`: bring every stage up to date, and show the result.

Prefect is imported only once some stage is known to be stale: importing it and starting its
server take longer than finding that out.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from dvc.exceptions import DvcException, NotDvcRepoError
from dvc.scm import SCMError
from dvc.utils.serialize import load_yaml
from rich.console import Console

from flows import child, display, graph, locks, needs, server, timeline
from flows.stage import ERROR, environment
from kd import SETTINGS, STAGES, disk, signals, workspace


class PipelineStoppedError(Exception):
    """A stage failed, or the run was cancelled."""


OURS = (
    ValueError,
    PipelineStoppedError,
    locks.WorkspaceBusyError,
    needs.WorkersCannotError,
    server.NoServerError,
)
"""Errors that are reported without a traceback."""
INTERRUPTED = 130
"""Exit status after Ctrl-C or SIGTERM, as shells use it."""


def main() -> int:
    """Run the stale stages in this folder; exit with 0 when all are up to date in the end."""
    parser = argparse.ArgumentParser(prog="python -m flows.pipeline", description=main.__doc__)
    parser.add_argument(
        "--remote",
        action="store_true",
        help="run the stages on the workers of a Prefect server (docs/orchestration.md)",
    )
    given = parser.parse_args()
    for number in signals.ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, interrupt)
    root = Path.cwd()
    if sys.__stdout__:  # sys.stdout itself may have been wrapped by DVC's colorama
        sys.__stdout__.reconfigure(errors="replace")  # not every locale has the timeline's blocks
    console = Console()
    complaints = Console(stderr=True, style="bold red", highlight=False, soft_wrap=True)
    try:
        with locks.workspace(root):
            plan = read(root)
        check_unseen(root)
        if not plan.reasons:
            console.print(f"Nothing to do: all {len(plan.stages)} stages are up to date.\n")
            display.show_report(root, console)
            return 0
        return run(plan, root, console, on_workers=given.remote)
    except (NotDvcRepoError, SCMError) as error:
        # A downloaded archive of the project has .dvc, and `dvc init` would refuse it.
        wanted = "`git init`" if (root / ".dvc").exists() else "`git init` and `dvc init`"
        complaints.print(
            f"error: {error}: work in a clone of the project, or {wanted} here", markup=False
        )
        return 1
    except (DvcException, *OURS) as error:
        complaints.print(f"error: {error}", markup=False)
        return 1
    except OSError as error:
        if not (said := disk.remedy(error)):
            raise
        complaints.print(f"error: {said}", markup=False)
        return 1
    except KeyboardInterrupt:
        complaints.print("stopped; finished stages are kept, and the next run continues from them")
        return INTERRUPTED


def interrupt(number: int, frame: FrameType | None) -> None:
    """On Ctrl-C or SIGTERM, end the run in good order; on another one, at once."""
    for each in signals.ENDING:
        signal.signal(each, leave)
    raise KeyboardInterrupt


def leave(number: int, frame: FrameType | None) -> None:
    """Exit as if killed, after which nothing is left behind (flows/leash.py).

    Prefect, interrupted while it cleans up, would print a traceback for each task.
    """
    cursor = b"\x1b[?25h" if os.isatty(2) else b""  # which the progress display hides
    os.write(2, cursor + b"stopped at once; the next run continues from what is saved\n")
    os._exit(INTERRUPTED)


def read(root: Path) -> graph.Plan:
    """Return the plan; where DVC fails, have kd check params.yaml for a better message.

    Raises:
        kd.component.ConfigError: params.yaml is wrong; the message names where.
        dvc.exceptions.DvcException: something else is wrong.
    """
    try:
        return graph.read(root)
    except DvcException:
        if is_ours(root):
            from kd import params  # 5 s, for a better message than DVC's

            params.load()
        raise


def check_unseen(root: Path) -> None:
    """Refuse a key of params.yaml that no stage reads, and outputs of a key that was removed.

    DVC notices neither.  An error inside a section makes its stage stale, and that stage reports
    it.

    Raises:
        kd.component.ConfigError: names the key and the closest valid one, or the folder.
    """
    if not is_ours(root):
        return
    experiment = load_yaml(root / "params.yaml")
    if not experiment.keys() <= {*STAGES, *SETTINGS}:
        from kd import params  # 5 s, for a better message than one written here

        params.load()
    workspace.check_foreign(experiment)


def check_writable(plan: graph.Plan) -> None:
    """Check that the stages' folders are writable, before DVC tries to empty them.

    Folders that do not exist yet are left to the stages: DVC would take them for outputs.

    Raises:
        OSError: a folder is not writable; names it.
    """
    workspace.check_writable("")
    for name in (stage.replace("@", "/") for stage in plan.reasons):
        if (workspace.ROOT / name).exists():
            workspace.check_writable(name)


def is_ours(root: Path) -> bool:
    """Whether dvc.yaml holds kd's own stages, so that params.yaml has kd's format."""
    path = root / "dvc.yaml"
    return path.exists() and set(load_yaml(path).get("stages", ())) == set(STAGES)


def check_params(root: Path) -> None:
    """Have kd validate all of params.yaml, in a fork of the warm process if there is one.

    Each stage does so, too; but DVC does not run a stage whose inputs are missing, which a
    misspelt name leads to.

    Raises:
        PipelineStoppedError: params.yaml is wrong; the message says how.
    """
    command = [sys.executable, "-m", "kd", "check"]
    done = subprocess.run(command, cwd=root, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise PipelineStoppedError(done.stderr.strip().removeprefix(ERROR))


def run(plan: graph.Plan, root: Path, console: Console, *, on_workers: bool) -> int:
    """Run the plan as a Prefect flow, on the user's server or on a temporary one.

    Raises:
        flows.needs.WorkersCannotError: something that workers need is missing.
        flows.server.NoServerError: PREFECT_API_URL does not answer, or our own server did not
            start, or the server was unreachable for too long.
        OSError: a folder is not writable; names it.
        PipelineStoppedError: a stage failed, or the run was cancelled.
    """
    locks.slots()  # reports a wrong KD_CPUS before anything starts
    if is_ours(root):
        check_writable(plan)
    display.show_plan(plan, console)
    server.configure(root)
    api = os.environ.get("PREFECT_API_URL")
    if on_workers:
        needs.check(root)
        if not api:
            raise needs.WorkersCannotError(
                "workers get their stages from a Prefect server: set PREFECT_API_URL to its "
                "address, both here and for the workers"
            )
    if api and not server.answers(f"{api}/health"):
        raise server.NoServerError(
            f"PREFECT_API_URL is {api}, and no Prefect server answers there: "
            "start it, or unset the variable to run without one"
        )
    own = None if api else server.Server(root)
    with contextlib.nullcontext() if on_workers else warm_process(root):
        with console.status("starting Prefect (half a minute the first time)"):
            from httpx import HTTPError

            from flows.flow import pipeline  # 3 s, while the server starts

            if own:
                own.wait()
            if is_ours(root):
                check_params(root)
        (root / timeline.FILE).unlink(missing_ok=True)
        try:
            with display.Progress(plan, console):
                state = pipeline(str(root), on_workers=on_workers, return_state=True)
        except HTTPError as error:
            raise server.NoServerError(
                f"Prefect's server at {os.environ['PREFECT_API_URL']} went away, or refused "
                f"PREFECT_API_AUTH_STRING ({error}): finished stages are kept, and the next run "
                "continues from them"
            ) from error
    console.print()
    if len(plan.reasons) > 1:
        display.show_timeline(root, console)
    if state.is_cancelled():
        raise KeyboardInterrupt  # in Prefect, which ends a run like Ctrl-C here
    if not state.is_completed():
        said = str(state.message or state.name)
        raise PipelineStoppedError(said.partition("PipelineFailedError: ")[2] or said)
    display.show_report(root, console)
    return 0


@contextlib.contextmanager
def warm_process(root: Path) -> Iterator[None]:
    """Keep a process running that has imported torch, for stages to fork from (kd/warm.py)."""
    if os.environ.get("KD_WARM") == "0" or sys.platform != "linux":
        yield
        return
    with disk.temporary() as folder:
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
