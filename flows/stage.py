"""Run one stage through DVC, in a child process, and take its result only if it can be trusted."""

import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from flows import child, graph

ADVICE = (
    "Generating lock file",
    "Updating lock file",
    "To track the changes with git",
    "\tgit add ",
    "To enable auto staging",
    "\tdvc config core.autostage",
    "Use `dvc push`",
    "Data and pipelines are up to date",
)
"""How lines begin that DVC prints after every stage, for people who call it by hand."""
DVC = (sys.executable, "-m", "dvc", "--wait-for-lock")
"""Without the wait, a stage that ends while another one is being recorded fails after three
seconds: trained, but not recorded."""
ERROR = "error: "
"""How the line begins in which `kd` says why it ends; DVC's own are in capitals."""
UNSTORED = "ERROR: failed to transfer "
"""How DVC's line begins that says which file it could not take into its cache, and why."""


class StageFailedError(Exception):
    """A stage ended with an error, ran too long, or its inputs were edited while it ran."""


def reproduce(
    stage: graph.Stage,
    root: Path,
    *,
    env: Mapping[str, str],
    hear: Callable[[str], None],
    stop: threading.Event,
    hold: Sequence[int] = (),
    pull: bool = False,
) -> graph.Hashes:
    """Run `stage` through `dvc repro`, which skips it when it is up to date after all.

    Args:
        stage: What to run.
        root: The workspace.
        env: What its environment has beside ours.
        hear: Called with each line it prints.
        stop: Cancels it when set.
        hold: Descriptors of locks that must stay taken while any of its processes lives.
        pull: Look in the DVC remote's run-cache first, where another machine may have put it.

    Returns:
        What it read and made.

    Raises:
        StageFailedError: see there; the message says why, in the stage's own words if it has any.
        flows.child.Stopped: `stop` was set.
    """
    before = graph.hashes(root, stage.name)
    errors: list[str] = []

    def keep(line: str) -> None:
        if line.startswith((ERROR, UNSTORED)):
            errors.append(line[len(ERROR) :])
        if not line.startswith(ADVICE):
            hear(line)

    options = ["--single-item", *(["--pull"] if pull else [])]
    try:
        code = child.run(
            [*DVC, "repro", *options, stage.name],
            cwd=root,
            env={**environment(), **env},
            hear=keep,
            stop=stop,
            timeout=stage.timeout,
            hold=hold,
        )
    except child.OutOfTime:
        raise StageFailedError(
            f"{stage.name} was stopped after its {stage.timeout:g} s (meta.timeout in dvc.yaml)"
        ) from None
    if code:
        raise StageFailedError(
            errors[-1] if errors else f"{stage.name} ended with exit code {code}"
        )
    after = graph.hashes(root, stage.name)
    _refuse_edited_inputs(stage, root, before.inputs, after.inputs)
    return after


def environment() -> dict[str, str]:
    """Ours, with this interpreter first: by `python` dvc.yaml means the environment's own."""
    return {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONUNBUFFERED": "1",  # lines are shown as they come
        "DVC_NO_ANALYTICS": "1",
        "KD_WARM": "0",  # a `dvc` that runs one stage alone gains nothing by one of its own
    }


def _refuse_edited_inputs(
    stage: graph.Stage, root: Path, before: dict[str, object], after: dict[str, object]
) -> None:
    """DVC would certify that the edited inputs made the output (its issue 11058)."""
    edited = [each for each in sorted({*before, *after}) if before.get(each) != after.get(each)]
    if edited:
        graph.disown(root, stage.name)
        raise StageFailedError(
            f"{stage.name}: edited while it ran: {', '.join(edited)}. "
            "Its result is not accepted; run the pipeline again"
        )
