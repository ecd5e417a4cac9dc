"""One stage on a remote worker: the Prefect flow that `python -m flows.worker` runs in its clone.

Code comes by git, data and results by the DVC remote, metrics go to the MLflow server.  Whoever
handed the stage out takes the result from the remote's run-cache (flows/remote.py).
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
"""The flow run's label that counts up while the stage's process lives."""
BEAT_SECONDS = 10.0
LOGGER = "stage"
"""Child of Prefect's logger for the stage's own lines, which are shown where it was ordered."""


SETTINGS = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "KD_PARENT_RUN")


@dataclass(frozen=True)
class Order:
    """All that a worker must be told to run a stage."""

    stage: graph.Stage

    commit: str

    inputs: tuple[str, ...]
    """Paths of the outputs that it reads, which DVC brings."""

    lock: dict[str, Any]
    """What dvc.lock has of the stages that made them."""

    env: dict[str, str]
    """What the stage's environment has beside the worker's."""


def settings() -> dict[str, str]:
    """What of this process's environment a stage is to have, wherever it runs."""
    return {key: os.environ[key] for key in SETTINGS if os.environ.get(key)}


@flow(name="stage", persist_result=False)
def stage(order: Order) -> None:
    """Run one stage in this worker's clone, and push what came of it.

    Raises:
        flows.stage.StageFailedError: the message says why.
        flows.locks.WorkspaceBusyError: another flow works in the clone.
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
                    env={**order.env, **settings(), **slot.env},  # the worker's own come first
                    hear=log.info,
                    stop=stop,
                    hold=[*slot.descriptors, workspace],
                    pull=True,
                )
            run("push", "--quiet", "--run-cache", order.stage.name)


def _check_out(order: Order, root: Path, run: Callable[..., None]) -> None:
    """Put the clone where the stage's inputs are as they were ordered.

    A pull alone would not do: DVC only fetches what is missing, and what an earlier stage left in
    the clone is there, but may be another version.
    """
    if not git.ask(root, "rev-parse", "--verify", "--quiet", f"{order.commit}^{{commit}}"):
        run("fetch", "--quiet", "origin", program="git")
    run("checkout", "--quiet", "--force", "--detach", order.commit, program="git")
    dump_yaml(str(root / "dvc.lock"), {"schema": "2.0", "stages": order.lock})
    if order.inputs:
        run("pull", "--quiet", "--force", *order.inputs)


def _runner(root: Path, stop: threading.Event, hold: list[int]) -> Callable[..., None]:
    """A function that runs a command of DVC's, or of another program, to its good end."""

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
    """Say every ten seconds that this process lives, which Prefect would believe of a killed one.

    Should the run have been given up meanwhile, since we could not be heard, or was it cancelled,
    the stage is stopped.
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
