"""Publish Prefect artifacts of a run: why and when stages ran, and links to MLflow.

If the server is unreachable or the disk full, the artifact is lost, but the run goes on.
"""

import contextlib
import json
import logging
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import httpx
from prefect.artifacts import create_markdown_artifact

from flows import graph
from flows.timeline import FILE, Timeline
from kd import STAGES

log = logging.getLogger(__name__)


def publish_plan(plan: graph.Plan) -> None:
    """Attach to the flow run which stages are stale, and why."""
    attach(
        _table(("stage", "because"), plan.reasons.items()),
        key="plan",
        description=f"{len(plan.reasons)} of {len(plan.stages)} stages to run",
    )


def publish_stage(root: Path, name: str, hashes: graph.Hashes) -> None:
    """Attach to the stage's task run its MLflow link, and DVC's hashes of inputs and outputs."""
    made = [(f"made `{path}`", value) for path, value in hashes.outputs.items()]
    read = [(f"read `{path}`", value) for path, value in hashes.inputs.items()]
    record = root / "artifacts" / "runs" / f"{name.replace('@', '/')}.json"
    link = _url(record) if str(record.relative_to(root)) in hashes.outputs else None
    lines = [f"[Its run in MLflow]({link})", ""] if link else []
    attach(
        "\n".join([*lines, _table(("", "DVC hash, or value"), [*made, *read])]),
        key=re.sub("[^a-z0-9]+", "-", f"stage {name.lower()}"),
        description=f"What {name} read and made",
    )


def publish(root: Path, times: Timeline, left: Collection[str]) -> None:
    """Attach the timeline and links to MLflow's runs to the flow run.

    Args:
        root: The workspace.
        times: When stages ran.
        left: Stages that were not completed: what artifacts/runs has of them is of an earlier run.
    """
    if drawn := times.draw():
        _write(root / FILE, f"{drawn}\n")
        attach(f"```\n{drawn}\n```", key="timeline", description="When each stage ran, and where")
    links = [
        (stage, f"[open]({link})")
        for stage, link in mlflow_links(root)
        if stage.replace("/", "@") not in left
    ]
    if links:
        attach(
            _table(("stage", "its run in MLflow"), links),
            key="mlflow-runs",
            description="The MLflow run of each stage that is up to date (`make ui` shows them)",
        )


def publish_report(root: Path) -> None:
    """Attach the report's table, where the pipeline has one."""
    table = root / "artifacts" / "report" / "report.md"
    if table.exists():
        attach(table.read_text("utf-8"), key="report", description="The result")


def mlflow_links(root: Path) -> Iterator[tuple[str, str]]:
    """Yield each tracked stage, in the pipeline's order, and the URL of its MLflow run."""
    folder = root / "artifacts" / "runs"
    for stage in STAGES:
        for path in sorted([folder / f"{stage}.json", *(folder / stage).glob("*.json")]):
            if link := _url(path):
                yield path.relative_to(folder).with_suffix("").as_posix(), link


def _url(record: Path) -> str | None:
    """The URL of the MLflow run that a stage's record names; None if it was not tracked."""
    with contextlib.suppress(FileNotFoundError):
        found: str | None = json.loads(record.read_text()).get("url")
        return found
    return None


def _table(head: tuple[str, str], rows: Iterable[tuple[str, object]]) -> str:
    lines = [f"| {left} | {right} |" for left, right in rows]
    return "\n".join([f"| {head[0]} | {head[1]} |", "| --- | --- |", *lines])


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, "utf-8")
    except OSError as error:  # do not mask the failing stage's message about the same disk
        log.warning("%s was not written: %s", path, error.strerror)


def attach(text: str, *, key: str, description: str) -> None:
    """Attach a Markdown text to the current run; only warn if the server is unreachable."""
    try:
        create_markdown_artifact(text, key=key, description=description)
    except (httpx.HTTPError, RuntimeError) as error:  # Prefect raises either if its server is down
        log.warning("the artifact %s was not saved: %s", key, error)
