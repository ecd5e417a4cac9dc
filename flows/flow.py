"""The Prefect flow: every stale stage is a task that runs one stage through DVC.

For a deployment name `flows/flow.py:pipeline`; for people there is `python -m flows.pipeline`.
"""

import contextlib
import threading
from pathlib import Path

import httpx
from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.context import TaskRunContext
from prefect.futures import PrefectFuture, wait
from prefect.runtime import flow_run
from prefect.states import Cancelled

from flows import graph, locks, results
from flows.child import Stopped
from flows.stage import reproduce

CANCEL_POLL = 3.0
"""Seconds between questions to the server whether the run was cancelled there."""


class PipelineFailedError(Exception):
    """At least one stage failed; what did not depend on it has finished."""


@task(task_run_name="{stage.name}", cache_policy=NO_CACHE, persist_result=False)
def run_stage(stage: graph.Stage, root: Path, workspace: int, stop: threading.Event) -> None:
    """Wait for a slot and run one stage there.  DVC decides whether there is anything to do."""
    log = get_run_logger()
    with locks.slots().take(threads=stage.threads, gpu=stage.gpu, stop=stop) as slot:
        log.info("starts on %s", slot.name, extra={"stage_state": "running"})
        try:
            reproduce(
                stage,
                root,
                env={**slot.env, **_run_ids()},
                hear=log.info,
                stop=stop,
                hold=[*slot.descriptors, workspace],
            )
        except Exception as error:  # DVC's own too: dvc.yaml may be edited while we run
            state = "stopped" if isinstance(error, Stopped) else "failed"
            log.error("%s", str(error) or "stopped", extra={"stage_state": state})
            raise
    log.info("done", extra={"stage_state": "done"})


@flow(name="pipeline", persist_result=False)
def pipeline(root: str = ".") -> State | None:
    """Bring every stage of `root`/dvc.yaml up to date.

    Args:
        root: The folder that holds dvc.yaml.

    Raises:
        PipelineFailedError: a stage failed; those after it were not run.
        flows.locks.WorkspaceBusyError: another flow works there.
    """
    folder = Path(root).resolve()
    stop = threading.Event()
    with locks.workspace(folder) as workspace:
        plan = graph.read(folder)
        futures: dict[str, PrefectFuture[None]] = {}
        for stage in plan.stages:
            if stage.name in plan.reasons:
                futures[stage.name] = run_stage.with_options(
                    name=stage.name.split("@")[0],
                    retries=stage.retries,
                    retry_condition_fn=lambda *_: not stop.is_set(),
                ).submit(
                    stage,
                    folder,
                    workspace,
                    stop,
                    return_state=False,
                    wait_for=[futures[each] for each in stage.waits_for if each in futures],
                )
        try:
            while wait(list(futures.values()), timeout=CANCEL_POLL).not_done:
                if _cancelled_on_the_server():
                    stop.set()
        except BaseException:
            stop.set()  # SIGINT and SIGTERM arrive here; no task may start another stage
            raise
    if stop.is_set():
        return Cancelled(message="cancelled on the server; all its processes were ended")
    for future in futures.values():
        future.wait()  # it is done, and this is when it takes over its task's last state
    if failed := [name for name, future in futures.items() if not future.state.is_completed()]:
        raise PipelineFailedError(f"not completed: {', '.join(failed)}")
    results.publish(folder)
    return None


def _run_ids() -> dict[str, str]:
    """For the stage's own records, which link back to this run."""
    context = TaskRunContext.get()
    assert context
    return {"KD_FLOW_RUN_ID": str(flow_run.id), "KD_TASK_RUN_ID": str(context.task_run.id)}


def _cancelled_on_the_server() -> bool:
    # A server that is away for a minute must not end the training.
    with contextlib.suppress(httpx.HTTPError), get_client(sync_client=True) as client:
        state = client.read_flow_run(flow_run.id).state
        return state is not None and (state.is_cancelling() or state.is_cancelled())
    return False
