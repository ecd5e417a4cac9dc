"""Retrain when data changed: the flow that a schedule or the event kd.data.changed starts.

infra/prefect.yaml deploys `flows/retrain_flow.py:retrain`; docs/schedules.md says how to use it.
"""

import threading
from pathlib import Path
from uuid import UUID

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed

from flows import graph, last_run, locks, upstream
from flows.flow import pipeline
from flows.pipeline import warm_process

NOTE = Path(".kd", "retrain.run")
"""Holds the last flow run's id, like the pipeline's note; see flows/last_run.py."""


@task(task_run_name="update", cache_policy=NO_CACHE, persist_result=False)
def update(root: Path, follow: bool, stop: threading.Event) -> graph.Plan:
    """Update code and data, and find out which stages are stale."""
    log = get_run_logger()
    with locks.workspace(root):
        last_run.follow(root, UUID(flow_run.id), NOTE)
        if follow:
            log.info(upstream.follow(root))
        log.info(upstream.pull(root, log.info, stop))
        plan = graph.read(root)
    for stage, reason in plan.reasons.items():
        log.info("%s is stale: %s", stage, reason)
    return plan


@task(task_run_name="push", cache_policy=NO_CACHE, persist_result=False)
def push(root: Path, stop: threading.Event) -> None:
    """Push the results to the DVC remote, if there is one."""
    log = get_run_logger()
    with locks.workspace(root):
        log.info(upstream.push(root, log.info, stop))


@flow(name="retrain", persist_result=False)
def retrain(root: str = ".", follow: bool = True, publish: str | None = None) -> State:
    """Bring the pipeline up to date with new data, and let the new student compete.

    Args:
        root: The folder that holds dvc.yaml: a clone that nobody works in.
        follow: Whether to take new commits of the branch's upstream first.
        publish: Where to copy the champion's exports: a folder, or a URL such as
            s3://bucket/models.

    Returns:
        Completed, with the message "nothing changed" or the stages that ran.

    Raises:
        flows.upstream.UpdateFailedError: new code or data could not be fetched.
        flows.flow.PipelineFailedError: a stage or the promotion failed; the next run
            continues from the finished stages.
        flows.locks.WorkspaceBusyError: another flow is using the folder.
    """
    folder, stop = Path(root).resolve(), threading.Event()
    try:
        plan = update(folder, follow, stop)
        with warm_process(folder):
            pipeline(str(folder), publish=publish)  # promotes, also when nothing changed
        push(folder, stop)  # also when nothing changed: an earlier run's push may have failed
    except BaseException:
        stop.set()
        raise
    what = f"ran {', '.join(plan.reasons)}" if plan.reasons else "nothing changed"
    get_run_logger().info(what)
    return Completed(message=what)
