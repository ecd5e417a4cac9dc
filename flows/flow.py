"""The Prefect flow: each stale stage is a task that runs the stage through DVC.

Deployments use `flows/flow.py:pipeline`; on the command line use `python -m flows.pipeline`.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import httpx
from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.context import TaskRunContext
from prefect.futures import PrefectFuture, wait
from prefect.runtime import flow_run
from prefect.states import Cancelled, Crashed
from prefect.utilities.urls import url_for

from flows import durations, graph, last_run, locks, remote, results
from flows.child import Stopped
from flows.promote import promote
from flows.stage import reproduce
from flows.timeline import Timeline

CANCEL_POLL = 3.0
"""Seconds between polls of the server for a cancellation."""


class PipelineFailedError(Exception):
    """At least one stage failed; stages that do not depend on it were still run."""


@dataclass(frozen=True)
class Here:
    """Runs stages on this machine, using its slots."""

    root: Path
    seconds: Mapping[str, float]
    """The expected duration of each stage."""

    def run(
        self,
        stage: graph.Stage,
        *,
        env: Mapping[str, str],
        log: remote.Log,
        stop: threading.Event,
        hold: Sequence[int],
    ) -> graph.Hashes:
        """Wait for a slot, run one stage on it, and return its input and output hashes.

        Raises:
            flows.stage.StageFailedError: the stage failed.
            flows.child.Stopped: `stop` was set.
        """
        log.info("waits for a slot", extra={"stage_state": "waiting"})
        with locks.slots().take(
            threads=stage.threads, gpu=stage.gpu, stop=stop, seconds=self.seconds[stage.name]
        ) as slot:
            log.info("starts on %s", slot.name, extra={"stage_state": "running"})
            return reproduce(
                stage,
                self.root,
                env={**slot.env, **env},
                hear=log.info,
                stop=stop,
                hold=[*slot.descriptors, *hold],
            )


Place = Here | remote.Workers


@task(task_run_name="{stage.name}", cache_policy=NO_CACHE, persist_result=False)
def run_stage(
    stage: graph.Stage, root: Path, place: Place, workspace: int, stop: threading.Event
) -> State | None:
    """Run one stage, here or on a worker.  DVC decides whether there is anything to do."""

    def work(log: remote.Log) -> None:
        hashes = place.run(stage, env=_run_ids(), log=log, stop=stop, hold=[workspace])
        results.publish_stage(root, stage.name, hashes)

    return _done(work)


@task(task_run_name="promote", cache_policy=NO_CACHE, persist_result=False)
def run_promotion(
    root: Path, workspace: int, publish: str | None, stop: threading.Event
) -> State | None:
    """Register the student, decide whether it becomes champion, and publish its exports."""

    def work(log: remote.Log) -> None:
        log.info("starts", extra={"stage_state": "running"})
        promote(root, publish, env=_run_ids(), hear=log.info, stop=stop, workspace=workspace)

    return _done(work)


def _done(work: Callable[[remote.Log], None]) -> State | None:
    """Do a task's work; its state if it was cancelled, as a failed one would raise an alert."""
    log = get_run_logger()
    try:
        work(log)
    except Stopped:
        log.warning("stopped", extra={"stage_state": "stopped"})
        return Cancelled(message="the run was cancelled; all its processes were stopped")
    except Exception as error:  # including DVC's: dvc.yaml may be edited during the run
        log.error("%s", error, extra={"stage_state": "failed"})
        raise
    log.info("done", extra={"stage_state": "done"})
    return None


@flow(name="pipeline", persist_result=False)
def pipeline(
    root: str = ".", publish: str | None = None, on_workers: bool = False
) -> State | None:
    """Bring every stage of `root`/dvc.yaml up to date, and let the student compete for champion.

    Args:
        root: The folder that holds dvc.yaml.
        publish: Where to copy the champion's exports: a folder, or a URL such as
            s3://bucket/models.
        on_workers: Run the stages on the workers of the work pools `gpu` and `cpu`.

    Raises:
        PipelineFailedError: a stage or the promotion failed; its dependents were not run.
        flows.needs.WorkersCannotError: a requirement for running on workers is not met.
        flows.locks.WorkspaceBusyError: another flow is running in `root`.
    """
    folder = Path(root).resolve()
    worker = os.getppid() if "PREFECT__FLOW_RUN_ID" in os.environ else None
    ended: State | None = None
    stop = threading.Event()
    with locks.workspace(folder) as workspace, Timeline(str(flow_run.id)) as times:
        last_run.follow(folder, UUID(flow_run.id))
        plan = graph.read(folder)
        results.publish_plan(plan)
        seconds = durations.expected(folder, plan.stages)
        place: Place = Here(folder, seconds)
        if on_workers and plan.reasons:
            place = remote.Workers(folder, plan, seconds)
        futures: dict[str, PrefectFuture[State | None]] = {}
        for stage in plan.stages:
            if stage.name in plan.reasons:
                futures[stage.name] = run_stage.with_options(
                    name=stage.name.split("@")[0],
                    retries=stage.retries,
                    retry_condition_fn=lambda *_: not stop.is_set(),
                ).submit(
                    stage,
                    folder,
                    place,
                    workspace,
                    stop,
                    return_state=False,
                    wait_for=[futures[each] for each in stage.waits_for if each in futures],
                )
        if plan.promotes:  # even if nothing was stale
            futures["promote"] = run_promotion.submit(
                folder, workspace, publish, stop, return_state=False, wait_for=[*futures.values()]
            )
        try:
            while wait(list(futures.values()), timeout=CANCEL_POLL).not_done:
                ended = ended or _ended_from_outside(worker)
                if ended:
                    stop.set()
        except BaseException:
            stop.set()  # SIGINT and SIGTERM arrive here; no task may start a stage now
            raise
        for future in futures.values():
            future.wait()  # already done, but only this updates its state to the task's final one
        left = [name for name, each in futures.items() if not each.state.is_completed()]
        results.publish(folder, times, left)
    if ended:
        return ended
    if left:
        raise PipelineFailedError(_first_reason(futures))
    results.publish_report(folder)
    return None


def _first_reason(futures: Mapping[str, PrefectFuture[State | None]]) -> str:
    """The first stage that failed, and why; others may just have depended on it."""
    left = [name for name, future in futures.items() if not future.state.is_completed()]
    failed = [name for name in left if futures[name].state.is_final()]
    reason = futures[failed[0]].result(raise_on_failure=False)
    others = f"; {len(left) - 1} more not completed" if len(left) > 1 else ""
    return f"{failed[0]}: {reason}{others}"


def _run_ids() -> dict[str, str]:
    """Environment variables that let the stage's own records link back to this run."""
    context = TaskRunContext.get()
    assert context
    task_run = context.task_run.id
    return {
        "KD_PIPELINE_RUN": str(flow_run.name),
        "KD_FLOW_RUN_ID": str(flow_run.id),
        "KD_TASK_RUN_ID": str(task_run),
        "KD_TASK_RUN_URL": url_for("task-run", task_run) or "",
    }


def _ended_from_outside(worker: int | None) -> State | None:
    """The final state of a run that was cancelled or lost its worker; None to keep running.

    Args:
        worker: PID of the Prefect worker that started this process.  Once it is gone, the next
            write to stdout would kill the run; so it stops here, while it can still clean up.
    """
    if worker is not None and os.getppid() != worker:
        return Crashed(message="its worker is gone; all its processes were stopped")
    if _cancelled_on_the_server():
        return Cancelled(message="cancelled on the server; all its processes were stopped")
    return None


def _cancelled_on_the_server() -> bool:
    # A brief server outage must not stop the training.
    with contextlib.suppress(httpx.HTTPError), get_client(sync_client=True) as client:
        state = client.read_flow_run(flow_run.id).state
        return state is not None and (state.is_cancelling() or state.is_cancelled())
    return False
