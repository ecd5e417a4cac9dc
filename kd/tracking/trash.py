"""Items deleted in MLflow, which keeps them until they are removed permanently."""
# mypy: disallow-untyped-calls=False
# MLflow gives types to half of its functions.

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import mlflow
from mlflow.entities import ViewType
from mlflow.entities.model_registry import ModelVersion
from mlflow.tracking._tracking_service.utils import _get_store

from kd.component import ConfigError


class Trash:
    """Runs, models and experiments deleted in a database store more than some days ago."""

    def __init__(self, uri: str, days: float) -> None:
        """Find them.

        Args:
            uri: The store's URI; it must be a database.
            days: Minimum age; items deleted more recently are left alone.

        Raises:
            ConfigError: a registered student refers to one of them.
        """
        self.uri, self.days = uri, days
        store = _get_store(uri)
        age = int(days * 86_400_000)
        client = mlflow.MlflowClient(uri)
        self.runs = {
            each: store.get_run(each).info.artifact_uri for each in store._get_deleted_runs(age)
        }
        self.models = {
            each: store.get_logged_model(each, allow_deleted=True).artifact_location
            for each in store._get_deleted_logged_models(older_than=age)
        }
        threshold = time.time() * 1000 - age
        self.experiments = {
            each.experiment_id: each.artifact_location
            for each in client.search_experiments(ViewType.DELETED_ONLY)
            if (each.last_update_time or 0) < threshold
        }
        for version in client.search_model_versions():
            self._spare(version)

    def sizes(self) -> Iterator[tuple[str, int]]:
        """Each item to be removed, and its size in bytes on this machine."""
        for kind, found in (
            ("run", self.runs),
            ("model", self.models),
            ("experiment", self.experiments),
        ):
            for identity, uri in found.items():
                yield f"{kind} {identity}", 0 if kind == "experiment" else _bytes(uri)

    def empty(self) -> str:
        """Remove them permanently; returns the output of `mlflow gc`."""
        done = subprocess.run(
            [sys.executable, "-m", "mlflow", "gc", "--older-than", f"{self.days}d"],
            env={**os.environ, "MLFLOW_TRACKING_URI": self.uri},  # it may hold a password
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise ConfigError(f"`mlflow gc` failed: {done.stderr.strip()[-1000:]}")
        return done.stdout.strip()

    def _spare(self, version: ModelVersion) -> None:
        """Raise a ConfigError if a registered version refers to an item to be removed."""
        run_id, uris = version.run_id or "", (version.source or "", *version.tags.values())
        needed = {run_id, *(uri.removeprefix("models:/") for uri in uris)}
        named = f"version {version.version} of {version.name}"
        if lost := needed & {*self.runs, *self.models}:
            raise ConfigError(
                f"{lost.pop()} was deleted in MLflow, but {named} needs it: "
                "restore it, or delete the version too"
            )
        if run_id and _get_store(self.uri).get_run(run_id).info.experiment_id in self.experiments:
            raise ConfigError(
                f"{named} is in an experiment that was deleted in MLflow: "
                "restore it, or delete the version too"
            )


def _bytes(uri: str) -> int:
    """Total size of the files below a folder; 0 if it is not on this machine."""
    parts = urlsplit(uri)
    if parts.scheme not in ("", "file"):
        return 0
    return sum(
        each.stat().st_size for each in Path(unquote(parts.path)).rglob("*") if each.is_file()
    )
