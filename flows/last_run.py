"""A run that was killed cannot say so: the next one in its folder says it for it.

Each run leaves its id in the workspace, which one run holds at a time.  Whoever holds it next
knows that the one before is over, and asks the server whether it was told.
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
"""The id of the Prefect run that holds the workspace, or held it last."""
REASON = "its process is gone; a later run in the same folder found this one open"


def follow(root: Path, run: UUID, where: Path = NOTE) -> None:
    """Mark the last run in `root` crashed if it is still open, and leave word of `run`.

    Call it while holding the workspace (flows/locks.py).

    Args:
        root: The workspace.
        run: The one that holds it now.
        where: Where word is left; a flow that runs another one in itself has a place of its own.
    """
    note = root / where
    last = note.read_text() if note.exists() else ""
    note.write_text(str(run))
    # A server that does not know it (another one, or a new database) has nothing to correct.
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
