"""Run one stage through DVC in a child process; reject the result if inputs changed meanwhile."""

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
"""Prefixes of hints that DVC prints after every stage, meant for people who run it by hand."""
DVC = (sys.executable, "-m", "dvc", "--wait-for-lock")
"""The DVC command.  Without the wait, a stage that ends while another one holds DVC's lock fails
after three seconds: trained, but not recorded."""
ERROR = "error: "
"""Prefix of the line in which `kd` reports why it failed; DVC's own is in capitals."""
UNSTORED = "ERROR: failed to transfer "
"""Prefix of the line in which DVC reports a file that it could not add to its cache, and why."""


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
        env: Environment variables to add to ours.
        hear: Called with each line it prints.
        stop: Cancels it when set.
        hold: Descriptors of locks that must stay held while any of its processes lives.
        pull: Look in the DVC remote's run-cache first, where another machine may have pushed it.

    Returns:
        The hashes of its inputs and outputs.

    Raises:
        StageFailedError: it failed, ran too long, or its inputs were edited meanwhile; the message
            is the stage's own if it gave one.
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
    """Our environment variables, with this interpreter first on PATH, for dvc.yaml's `python`."""
    return {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONUNBUFFERED": "1",  # show lines as soon as they are printed
        "DVC_NO_ANALYTICS": "1",
        "KD_WARM": "0",  # a `dvc` that runs a single stage gains nothing from its own warm process
    }


def _refuse_edited_inputs(
    stage: graph.Stage, root: Path, before: dict[str, object], after: dict[str, object]
) -> None:
    """Reject the result if inputs changed meanwhile.

    DVC would record the output as made from the edited inputs (its issue 11058).
    """
    edited = [each for each in sorted({*before, *after}) if before.get(each) != after.get(each)]
    if edited:
        graph.disown(root, stage.name)
        raise StageFailedError(
            f"{stage.name}: edited while it ran: {', '.join(edited)}. "
            "Its result is not accepted; run the pipeline again"
        )
