"""What a run leaves to look at: the report's table, and a link to each stage's MLflow run."""

import json
from collections.abc import Iterator
from pathlib import Path

from prefect.artifacts import create_link_artifact, create_markdown_artifact


def publish(root: Path) -> None:
    """Attach them to the Prefect run."""
    table = root / "artifacts" / "report" / "report.md"
    if table.exists():
        create_markdown_artifact(table.read_text(), key="report", description="The result")
    for stage, link in mlflow_links(root):
        create_link_artifact(
            link, link_text=f"{stage} in MLflow", key=f"mlflow-{_key(stage)}", description=stage
        )


def mlflow_links(root: Path) -> Iterator[tuple[str, str]]:
    """The name of each stage that was tracked, and the address of its MLflow run."""
    folder = root / "artifacts" / "runs"
    for path in sorted(folder.rglob("*.json")):
        record = json.loads(path.read_text())
        if record.get("url"):
            yield path.relative_to(folder).with_suffix("").as_posix(), record["url"]


def _key(name: str) -> str:
    """Prefect's keys know small letters, digits and dashes."""
    return "".join(each if each.isalnum() else "-" for each in name.lower())
