"""Stages on workers that share no disk with us: handed to Prefect work pools, results from DVC.

A worker (flows/remote_stage.py) checks out our commit, pulls what the stage reads, runs it and
pushes the result with its entry in DVC's run-cache.  That entry is found by what the stage reads
and not by who ran it, so `dvc repro` here finds the stage done, and records it in our dvc.lock.
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
"""Work pools: for stages that a GPU helps, and for the others."""
POLL = 2.0
"""Seconds between looks at a stage that was handed out."""
PATIENCE = 60.0
"""Seconds without a sign of life after which a worker counts as dead; it gives one every ten."""
LIVES = 3
"""How many workers may die over one stage: it may be the stage that kills them."""
LONGEST = timedelta(days=7)
"""Nothing is expected to take longer; see `Workers._hand_out`."""
Log = logging.Logger | logging.LoggerAdapter[Any]


class Workers:
    """The workers of a Prefect server, ready for the stages of one plan."""

    def __init__(self, root: Path, plan: graph.Plan, seconds: Mapping[str, float]) -> None:
        """See that workers can do it, and give them what they will need.

        Args:
            root: Our workspace.
            plan: What is to be done.
            seconds: How long each stage will probably take.

        Raises:
            flows.needs.WorkersCannotError: names what is missing, and the remedy.
            flows.stage.StageFailedError: the DVC remote did not take our data.
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
        """Have a worker run `stage`, and take over its result; what it read and made.

        Raises:
            flows.stage.StageFailedError: the stage failed there, or its result did not come.
            flows.child.Stopped: `stop` was set; the worker was told.
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
        """The id of a flow run that does it.

        A flow that was killed leaves its workers at work: the order's digest, as a key that the
        server creates one run for, finds the run that is still under way.  Workers take the run
        with the earliest time first, so a stage is dated back by what it will take.
        """
        told = asdict(order)
        del told["env"]  # says who ordered it
        key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
        ahead = min(self.seconds[order.stage.name], LONGEST.total_seconds())
        for number in itertools.count():
            run = client.create_flow_run_from_deployment(
                self.deployments[_pool(order.stage)],
                parameters={"order": asdict(order)},
                state=Scheduled(scheduled_time=datetime.now(UTC) - timedelta(seconds=ahead)),
                name=order.stage.name,
                tags=["kd", str(order.env.get("KD_PIPELINE_RUN", ""))],
                idempotency_key=f"{key}-{number}",
            )
            if not (run.state and run.state.is_final()):
                return run.id
        raise AssertionError

    def _take_over(
        self, stage: graph.Stage, log: Log, stop: threading.Event, hold: Sequence[int]
    ) -> graph.Hashes:
        """Bring the result here, and never train here.

        DVC runs commands by $SHELL: with one that refuses, a stage that is not in the run-cache
        fails instead.
        """
        env = {"SHELL": str(shutil.which("false"))}
        try:
            return reproduce(
                stage, self.root, env=env, hear=log.info, stop=stop, hold=hold, pull=True
            )
        except StageFailedError as error:
            raise StageFailedError(
                f"{stage.name}: a worker finished it, but the DVC remote has no result for the "
                f"inputs that are here now; were they edited?\n{error}"
            ) from error


class HandedOut:
    """A stage that was handed out."""

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
        """Its last state, once it has one; its lines are logged on the way.

        Raises:
            flows.child.Stopped: `stop` was set, and the worker was told.
        """
        while not self.stop.wait(POLL):
            try:
                self._hear()
                state = self._look()
                if state.is_scheduled():
                    self._count_workers()
            except httpx.HTTPError:
                # The server is away: that says nothing of the worker.
                self.since = time.monotonic()
                continue
            if state.is_final():
                return state
        self._cancel()
        raise Stopped

    def _look(self) -> State:
        """Its state; CRASHED where its process gives no sign of life."""
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
        """Say so where nobody is left to take it; it waits on, since somebody may come."""
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
        """Tell the worker, and wait until the stage has ended there."""
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
    except ObjectNotFound:  # of the pool, which the first worker makes
        return False
    return any(each.status is WorkerStatus.ONLINE for each in workers)


def _unattended(pool: str) -> str:
    return (
        f"no worker of work pool {pool} is there: start one, in a clone of its own, "
        f"by `python -m flows.worker {pool}`"
    )


def _deploy(pools: set[str]) -> dict[str, UUID]:
    """Tell the server what workers run: the flow `stage`, as their own clone has it."""
    with get_client(sync_client=True) as client:
        flow_id = client.create_flow_from_name("stage")
        return {
            pool: client.create_deployment(
                flow_id, pool, entrypoint="flows.remote_stage.stage", work_pool_name=pool
            )
            for pool in pools
        }


def _push(root: Path, stale: list[str]) -> None:
    """Push what stale stages read, and no stale stage makes: that is here alone, for all we know.

    Raises:
        flows.stage.StageFailedError: DVC could not; the message has its last lines.
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
