"""Mark a killed run as crashed: it cannot do so itself, so the next run in its folder does.

Each run writes its id to the workspace, which only one run can hold at a time.  The next holder
thus knows that the previous run is over, and checks whether the server knows it too.
"""

import contextlib
from pathlib import Path
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.exceptions import ObjectNotFound
from prefect.states import Crashed

NOTE = Path(".kd", "flow.run")
"""File with the id of the Prefect run that holds the workspace, or held it last."""
REASON = "its process is gone; a later run in the same folder found it still open"


def follow(root: Path, run: UUID, where: Path = NOTE) -> None:
    """Mark the last run in `root` as crashed if it is still open, and record `run` instead.

    Call this while holding the workspace (flows/locks.py).

    Args:
        root: The workspace.
        run: The run that holds it now.
        where: File for the id; a flow that runs another flow inside it needs its own.
    """
    note = root / where
    last = note.read_text() if note.exists() else ""
    note.write_text(str(run))
    # Nothing to correct on a server that does not know the run (another one, or a new database).
    with contextlib.suppress(ValueError, ObjectNotFound, httpx.HTTPError):
        if UUID(last) != run:
            with get_client(sync_client=True) as client:
                _close(client, UUID(last))


def _close(client: SyncPrefectClient, run: UUID) -> None:
    state = client.read_flow_run(run).state
    if state is None or state.is_final():
        return
    of_run = FlowRunFilter(id=FlowRunFilterId(any_=[run]))
    for task in client.read_task_runs(flow_run_filter=of_run):
        if task.state is None or not task.state.is_final():
            client.set_task_run_state(task.id, Crashed(message=REASON), force=True)
    client.set_flow_run_state(run, Crashed(message=REASON), force=True)
