"""Run stages on workers that share no disk with us: Prefect work pools, and results by DVC.

A worker (flows/remote_stage.py) checks out our commit, pulls the stage's inputs, runs it and
pushes the outputs with their entry in DVC's run-cache.  That entry is keyed by the stage's inputs
and not by who ran it, so `dvc repro` here gets a cache hit, and records it in our dvc.lock.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
from prefect.client.schemas.objects import State, WorkerStatus
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Cancelling, Crashed, Scheduled

from flows import child, graph, needs
from flows.child import Stopped
from flows.remote_stage import BEAT, LOGGER, Order, settings
from flows.stage import DVC, StageFailedError, environment, reproduce

POOLS = ("gpu", "cpu")
"""Work pools: for stages that benefit from a GPU, and for the others."""
POLL = 2.0
"""Seconds between polls of a submitted stage."""
PATIENCE = 60.0
"""Seconds without a heartbeat after which a worker counts as dead; it sends one every ten."""
LIVES = 3
"""How many workers may die on one stage: it may be the stage that kills them."""
LONGEST = timedelta(days=7)
"""Cap on a stage's expected duration; see `Workers._hand_out`."""
Log = logging.Logger | logging.LoggerAdapter[Any]


class Workers:
    """The workers of a Prefect server, prepared for the stages of one plan."""

    def __init__(self, root: Path, plan: graph.Plan, seconds: Mapping[str, float]) -> None:
        """Check that workers can run the plan, create deployments, and push the inputs.

        Args:
            root: Our workspace.
            plan: The stages, and which of them are stale.
            seconds: Each stage's expected duration.

        Raises:
            flows.needs.WorkersCannotError: names what is missing, and the remedy.
            flows.stage.StageFailedError: pushing our data to the DVC remote failed.
        """
        self.root = root
        self.seconds = seconds
        self.commit = needs.check(root)
        stale = [each for each in plan.stages if each.name in plan.reasons]
        _check_workers({_pool(each) for each in stale})
        self.deployments = _deploy({_pool(each) for each in stale})
        _push(root, [each.name for each in stale])

    def run(
        self,
        stage: graph.Stage,
        *,
        env: Mapping[str, str],
        log: Log,
        stop: threading.Event,
        hold: Sequence[int],
    ) -> graph.Hashes:
        """Have a worker run `stage`, fetch the result, and return its input and output hashes.

        Raises:
            flows.stage.StageFailedError: the stage failed there, or its result is not available.
            flows.child.Stopped: `stop` was set; the worker was told to cancel.
        """
        order = self._order(stage, env)
        for _ in range(LIVES):
            waiting = {"stage_state": "waiting"}
            log.info("waits for a worker of pool %s", _pool(stage), extra=waiting)
            with get_client(sync_client=True) as client:
                run_id = self._hand_out(client, order)
                state = HandedOut(client, run_id, _pool(stage), log, stop).follow()
            if not state.is_crashed():
                break
            lost = {"stage_state": "stopped"}
            log.warning("lost its worker (%s)", state.message, extra=lost)
        if not state.is_completed():
            said = str(state.message or f"{stage.name}: {state.name} on the worker")
            raise StageFailedError(said.partition("StageFailedError: ")[2] or said)
        return self._take_over(stage, log, stop, hold)

    def _order(self, stage: graph.Stage, env: Mapping[str, str]) -> Order:
        inputs, lock = graph.tracked_inputs(self.root, [stage.name])
        return Order(stage, self.commit, inputs, lock, {**settings(), **env})

    def _hand_out(self, client: SyncPrefectClient, order: Order) -> UUID:
        """Create the flow run for `order`, or find the one still under way; return its id.

        If our flow is killed, its workers carry on.  The order's digest serves as idempotency key,
        for which the server creates one run only, so the next flow finds the run still under way.
        Workers take the run with the earliest scheduled time first, so each is backdated by its
        expected duration: long stages start first.
        """
        told = asdict(order)
        del told["env"]  # differs from one flow run to the next
        key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
        ahead = min(self.seconds[order.stage.name], LONGEST.total_seconds())
        for number in itertools.count():
            run = client.create_flow_run_from_deployment(
                self.deployments[_pool(order.stage)],
                parameters={"order": asdict(order)},
                state=Scheduled(scheduled_time=datetime.now(UTC) - timedelta(seconds=ahead)),
                name=order.stage.name,
                tags=["kd", order.env["KD_PIPELINE_RUN"]],
                idempotency_key=f"{key}-{number}",
            )
            if not (run.state and run.state.is_final()):
                return run.id
        raise AssertionError

    def _take_over(
        self, stage: graph.Stage, log: Log, stop: threading.Event, hold: Sequence[int]
    ) -> graph.Hashes:
        """Fetch the result from the run-cache, and never train here.

        DVC runs commands with $SHELL.  We set it to `false`, so that a stage that is missing from
        the run-cache fails instead of running.
        """
        env = {"SHELL": str(shutil.which("false"))}
        try:
            return reproduce(
                stage, self.root, env=env, hear=log.info, stop=stop, hold=hold, pull=True
            )
        except StageFailedError as error:
            raise StageFailedError(
                f"{stage.name}: a worker finished it, but the DVC remote has no result for its "
                f"inputs as they are here now; were they edited?\n{error}"
            ) from error


class HandedOut:
    """A stage that was submitted to a work pool."""

    def __init__(
        self,
        client: SyncPrefectClient,
        run_id: UUID,
        pool: str,
        log: Log,
        stop: threading.Event,
    ) -> None:
        self.client = client
        self.run_id = run_id
        self.pool = pool
        self.log = log
        self.stop = stop
        self.heard = 0
        self.sign: object = None
        self.since = self.counted = time.monotonic()
        self.attended = True

    def follow(self) -> State:
        """Wait for the stage to end, logging its lines meanwhile; return its final state.

        Raises:
            flows.child.Stopped: `stop` was set; the worker was told to cancel.
        """
        while not self.stop.wait(POLL):
            try:
                state = self._look()
                self._hear()  # after it, so that the last lines of a stage that ended are heard
                if state.is_scheduled():
                    self._count_workers()
            except httpx.HTTPError:
                # The server is unreachable, which says nothing about the worker.
                self.since = time.monotonic()
                continue
            if state.is_final():
                return state
        self._cancel()
        raise Stopped

    def _look(self) -> State:
        """The run's state; set to CRASHED if its process has stopped sending heartbeats."""
        run = self.client.read_flow_run(self.run_id)
        assert run.state
        sign = (run.state.type, run.labels.get(BEAT))
        if sign != self.sign or run.state.is_scheduled() or run.state.is_final():
            self.sign, self.since = sign, time.monotonic()
        elif time.monotonic() - self.since > PATIENCE:
            dead: State = Crashed(message=f"no sign of life for {PATIENCE:g} s")
            self.client.set_flow_run_state(self.run_id, dead, force=True)
            return dead
        return run.state

    def _count_workers(self) -> None:
        """Warn if no worker is left to take the stage; keep waiting, since one may be started."""
        if time.monotonic() - self.counted < PATIENCE:
            return
        attended, self.counted = _attended(self.client, self.pool), time.monotonic()
        if self.attended and not attended:
            self.log.warning("waits, but %s", _unattended(self.pool))
        self.attended = attended

    def _hear(self) -> None:
        which = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[self.run_id]))
        lines = self.client.read_logs(which, offset=self.heard)
        self.heard += len(lines)
        for line in lines:
            if line.name.endswith(f".{LOGGER}"):
                starts = {"stage_state": "running"} if line.message.startswith("starts on") else {}
                self.log.info("%s", line.message, extra=starts)

    def _cancel(self) -> None:
        """Tell the worker to cancel, and wait until the stage has ended there."""
        deadline = time.monotonic() + PATIENCE
        with contextlib.suppress(httpx.HTTPError):
            waits = self.client.read_flow_run(self.run_id).state
            state: State = Cancelled() if waits and waits.is_scheduled() else Cancelling()
            self.client.set_flow_run_state(self.run_id, state)
            while time.monotonic() < deadline and not self._look().is_final():
                time.sleep(POLL)


def _pool(stage: graph.Stage) -> str:
    return POOLS[0] if stage.gpu else POOLS[1]


def _check_workers(pools: set[str]) -> None:
    with get_client(sync_client=True) as client:
        for pool in sorted(pools):
            if not _attended(client, pool):
                raise needs.WorkersCannotError(_unattended(pool))


def _attended(client: SyncPrefectClient, pool: str) -> bool:
    try:
        client.read_work_pool(pool)
        workers = client.read_workers_for_work_pool(pool)
    except ObjectNotFound:  # no such pool yet: its first worker creates it
        return False
    return any(each.status is WorkerStatus.ONLINE for each in workers)


def _unattended(pool: str) -> str:
    return (
        f"no worker of work pool {pool} is online: start one, in a clone of its own, "
        f"by `python -m flows.worker {pool}`"
    )


def _deploy(pools: set[str]) -> dict[str, UUID]:
    """Create a deployment per pool: the flow `stage`, imported from the worker's own clone."""
    with get_client(sync_client=True) as client:
        flow_id = client.create_flow_from_name("stage")
        return {
            pool: client.create_deployment(
                flow_id, pool, entrypoint="flows.remote_stage.stage", work_pool_name=pool
            )
            for pool in pools
        }


def _push(root: Path, stale: list[str]) -> None:
    """Push the stale stages' inputs that no stale stage makes: the remote may not have them yet.

    Raises:
        flows.stage.StageFailedError: `dvc push` failed; the message has its last lines.
    """
    needed, _ = graph.tracked_inputs(root, stale)
    if not needed:
        return
    lines: list[str] = []
    code = child.run(
        [*DVC, "push", "--quiet", *needed],
        cwd=root,
        env=environment(),
        hear=lines.append,
        stop=threading.Event(),
    )
    if code:
        raise StageFailedError("\n".join(["`dvc push` failed", *lines[-15:]]))
