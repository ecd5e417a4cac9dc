"""One stage on a remote worker: the Prefect flow that `python -m flows.worker` runs in its clone.

Code comes from git, data and results go through the DVC remote, metrics to the MLflow server.
The flow that submitted the stage takes the result from the remote's run-cache (flows/remote.py).
"""

import itertools
import os
import platform
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from dvc.utils.serialize import dump_yaml
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.logging.loggers import flow_run_logger
from prefect.runtime import flow_run

from flows import child, graph, locks
from flows.checkpoints import Checkpoints
from flows.stage import DVC, StageFailedError, environment, reproduce
from kd import git

BEAT = "kd.beat"
"""Label of the flow run that counts up while the stage's process is alive."""
BEAT_SECONDS = 10.0
LOGGER = "stage"
"""Child of Prefect's logger for the stage's own lines, which the submitting flow shows."""


SETTINGS = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "KD_PARENT_RUN")


@dataclass(frozen=True)
class Order:
    """Everything a worker needs to know to run a stage."""

    stage: graph.Stage

    commit: str

    inputs: tuple[str, ...]
    """Paths of the outputs of other stages that it reads; DVC pulls them."""

    lock: dict[str, Any]
    """The entries in dvc.lock of the stages that made them."""

    env: dict[str, str]
    """Environment variables for the stage; the worker's own `SETTINGS` take precedence."""


def settings() -> dict[str, str]:
    """The environment variables of this process that every stage gets, wherever it runs."""
    return {key: os.environ[key] for key in SETTINGS if os.environ.get(key)}


@flow(name="stage", persist_result=False)
def stage(order: Order) -> None:
    """Run one stage in this worker's clone, and push its result.

    Raises:
        flows.stage.StageFailedError: the stage, git or DVC failed; the message says why.
        flows.locks.WorkspaceBusyError: another flow is using the clone.
    """
    run_id = UUID(str(flow_run.id))
    log = flow_run_logger(flow_run_id=run_id).getChild(LOGGER)
    root, stop = Path(os.environ["KD_CLONE"]), threading.Event()
    with _beating(run_id, stop), locks.workspace(root) as workspace:
        run = _runner(root, stop, [workspace])
        _check_out(order, root, run)
        slots = locks.slots()
        with Checkpoints(root, order.stage.name, log.warning).carried():
            with slots.take(threads=order.stage.threads, gpu=order.stage.gpu, stop=stop) as slot:
                log.info("starts on %s of %s:%s", slot.name, platform.node(), root.name)
                reproduce(
                    order.stage,
                    root,
                    env={**order.env, **settings(), **slot.env},  # the worker's settings win
                    hear=log.info,
                    stop=stop,
                    hold=[*slot.descriptors, workspace],
                    pull=True,
                )
            run("push", "--quiet", "--run-cache", order.stage.name)


def _check_out(order: Order, root: Path, run: Callable[..., None]) -> None:
    """Check out the order's commit, and pull the exact versions of the stage's inputs.

    The pull needs dvc.lock and --force: an earlier stage may have left other versions of the
    inputs in the clone.
    """
    if not git.ask(root, "rev-parse", "--verify", "--quiet", f"{order.commit}^{{commit}}"):
        run("fetch", "--quiet", "origin", program="git")
    run("checkout", "--quiet", "--force", "--detach", order.commit, program="git")
    dump_yaml(str(root / "dvc.lock"), {"schema": "2.0", "stages": order.lock})
    if order.inputs:
        run("pull", "--quiet", "--force", *order.inputs)


def _runner(root: Path, stop: threading.Event, hold: list[int]) -> Callable[..., None]:
    """Return a function that runs a DVC (or other) command, and raises if it fails."""

    def run(*words: str, program: str = "dvc") -> None:
        last = deque[str](maxlen=15)
        code = child.run(
            [*(DVC if program == "dvc" else [program]), *words],
            cwd=root,
            env=environment(),
            hear=last.append,
            stop=stop,
            hold=hold,
        )
        if code:
            failed = f"`{program} {' '.join(words)}` on {platform.node()}, {root}"
            raise StageFailedError("\n".join([f"{failed} ended with exit code {code}", *last]))

    return run


@contextmanager
def _beating(run_id: UUID, stop: threading.Event) -> Iterator[None]:
    """Send a heartbeat every ten seconds: Prefect would take a killed process for running.

    Stops the stage if the run was cancelled, or was given up because no heartbeat got through.
    """
    ended = threading.Event()

    def beat() -> None:
        with get_client(sync_client=True) as client:
            for number in itertools.count():
                with suppress(httpx.HTTPError):
                    client.update_flow_run_labels(run_id, {BEAT: number})
                    state = client.read_flow_run(run_id).state
                    if state and (state.is_final() or state.is_cancelling()):
                        stop.set()
                if ended.wait(BEAT_SECONDS):
                    return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(BEAT_SECONDS)
