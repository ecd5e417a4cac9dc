"""MLflow: the store, one stage's session in it, and the registry.

Besides models.py and trash.py the only module that imports MLflow.  Only the recorder process
(kd/tracking/recorder.py) runs it, so that training does not wait for it.
"""
# mypy: disallow-untyped-calls=False
# MLflow gives types to half of its functions.

import hashlib
import json
import os
import socket
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import mlflow
from mlflow.entities import Dataset, DatasetInput, LoggedModelOutput, Metric, Param, RunTag
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from kd.tracking import contact, models, provenance, views
from kd.tracking.address import sqlite_path, without_password

T = TypeVar("T")

SAMPLING_SECONDS = 2.0
"""Interval of system metrics; MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL overrides it."""
LOCAL_PAGES = "http://127.0.0.1:5000"
"""Where `make ui` serves a store that has no server of its own."""
MOST_METRICS, MOST_TAGS, LONGEST_PARAM, LONGEST_TAG, LONGEST_DIGEST = 1000, 100, 6000, 8000, 36
"""MLflow's limits: entries per batch, and lengths of values."""


class Store:
    """An MLflow store; a SQLite store's tables are created or upgraded if necessary."""

    def __init__(self, uri: str, root: Path) -> None:
        """Args: the store's URI, and the repository whose commit and dvc.lock are recorded."""
        self.uri = uri
        self.root = root
        if path := sqlite_path(uri):
            make_tables(path)
        mlflow.set_tracking_uri(uri)
        self.client = mlflow.MlflowClient(uri, os.environ.get("MLFLOW_REGISTRY_URI") or uri)
        self.registry_lock = contact.folder() / f"{contact.digest(uri)}.registry.lock"

    def begin(self, start: Mapping[str, Any]) -> "Session":
        """Begin a run, after ending those that dead processes of this machine left RUNNING."""
        experiment = self._experiment(start["experiment"])
        self._reap(experiment)
        if start["resume"] and (last := self._last(experiment, start["resume"])):
            return Session(self, experiment, last, start["pid"], resumed=True)
        name = "/".join(filter(None, (start["stage"], start["name"])))
        tags = {
            "kd.stage": start["stage"],
            "kd.name": start["name"] or start["stage"],
            "mlflow.source.name": " ".join(filter(None, ("kd", start["stage"], start["name"]))),
            "mlflow.source.type": "LOCAL",
            **provenance.tags(self.root, start["stage"], start["name"], start["pid"]),
            **start["tags"],
            **_note(start["tags"]),
            **({"mlflow.parentRunId": start["parent"]} if start["parent"] else {}),
        }
        tags = {key: str(value)[:LONGEST_TAG] for key, value in tags.items()}
        run = self.client.create_run(experiment, int(start["time"] * 1000), tags, name)
        session = Session(self, experiment, run.info.run_id, start["pid"])
        session.log_params(start["params"])
        if data_hash := tags.get("kd.data_hash"):
            source = json.dumps({"uri": "artifacts/data"})  # as mlflow.data.get_source reads it
            data = Dataset("data", data_hash[:LONGEST_DIGEST], "local", source)
            self.client.log_inputs(run.info.run_id, datasets=[DatasetInput(data)])
        return session

    def answers(self, patience: float) -> bool:
        """Whether the store answers; retries for `patience` seconds."""
        until = time.monotonic() + patience
        while True:
            try:
                self.client.search_experiments(max_results=1)
            except Exception:
                if time.monotonic() > until:
                    return False
                time.sleep(1)
            else:
                return True

    def _last(self, experiment: str, tags: Mapping[str, str]) -> str | None:
        """The id of the latest run with these tags, if any."""
        wanted = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        found = self.client.search_runs([experiment], wanted, max_results=1)
        return str(found[0].info.run_id) if found else None

    def _experiment(self, name: str) -> str:
        """The id of the experiment `name`, created if missing."""
        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self.client.create_experiment(name, self._artifacts(), views.tags()))
            except mlflow.MlflowException:
                found = self.client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)  # it existed, or another recorder was faster

    def _artifacts(self) -> str | None:
        """Where artifacts go: next to a SQLite file, else .kd; None leaves it to a server."""
        if self.uri.startswith(("http://", "https://", "databricks")):
            return None
        path = sqlite_path(self.uri)
        return str((path.parent if path else self.root / ".kd") / "mlruns")

    def _reap(self, experiment: str) -> None:
        """End the runs whose process and recorder were both killed."""
        running = self.client.search_runs(
            [experiment],
            f"attributes.status = 'RUNNING' and tags.`kd.host` = '{socket.gethostname()}'",
        )
        for run in running:
            tags = run.data.tags
            if "kd.pid" in tags and not provenance.lives(tags):
                reason = f"process {tags['kd.pid']} is gone; a later run found this one RUNNING"
                self.client.set_tag(run.info.run_id, "kd.end_reason", reason)
                self.client.set_terminated(run.info.run_id, "KILLED")


class Session:
    """One stage's run."""

    def __init__(
        self, store: Store, experiment: str, run_id: str, pid: int, resumed: bool = False
    ) -> None:
        """Args: store, ids of experiment and run, the stage's pid, whether the run had ended."""
        self.store = store
        self.experiment = experiment
        self.run_id = run_id
        self.pid = pid
        self._monitor = None if resumed else self._watch()

    @property
    def url(self) -> str:
        """The run's page."""
        uri = without_password(self.store.uri)
        pages = uri if uri.startswith("http") else LOCAL_PAGES
        path = f"#/experiments/{self.experiment}/runs/{self.run_id}"
        return f"{pages.rstrip('/')}/{path}?{views.TRAINING}"

    def do(self, do: str, **fields: Any) -> Any:
        """Carry out a stage's message `do`, by the method on_<do>; returns the answer, if any."""
        return getattr(self, f"on_{do}")(**fields)

    def resume(self) -> None:
        """Restart the sampling of system metrics, which MLflow stops when its store fails."""
        if self._monitor is not None:
            self._monitor.finish()
            self._monitor = self._watch(resume_logging=True)

    def _watch(self, **more: bool) -> SystemMetricsMonitor:
        monitor = SystemMetricsMonitor(
            self.run_id,
            sampling_interval=SAMPLING_SECONDS,
            tracking_uri=self.store.uri,
            **more,
        )
        monitor.start()
        return monitor

    def log_params(self, params: Mapping[str, str]) -> None:
        """Log params; MLflow does not allow changing them later."""
        for part in _parts([Param(k, v[:LONGEST_PARAM]) for k, v in params.items()], MOST_TAGS):
            self.store.client.log_batch(self.run_id, params=part)

    def on_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags."""
        for part in _parts([RunTag(k, str(v)[:LONGEST_TAG]) for k, v in tags.items()], MOST_TAGS):
            self.store.client.log_batch(self.run_id, tags=part)

    def on_metrics(self, points: Sequence[tuple[int, Mapping[str, float]]], time: float) -> None:
        """Log points of each metric."""
        at = int(time * 1000)
        every = [
            Metric(key, value, at, step) for step, row in points for key, value in row.items()
        ]
        for part in _parts(every, MOST_METRICS):
            self.store.client.log_batch(self.run_id, metrics=part)

    def on_file(self, path: str, folder: str) -> None:
        """Upload a file or folder."""
        self.store.client.log_artifact(self.run_id, path, folder or None)

    def on_model(
        self,
        folder: str,
        registered_name: str,
        val_accuracy: float,
        val_hash: str,
        example: list[Any],
        beside: list[str],
    ) -> None:
        """Log and register the student in a folder, unless it is already registered."""
        manifest = json.loads(Path(folder, "manifest.json").read_text())
        tags = {
            "kd.sha256": manifest["sha256"],
            "kd.val_accuracy": repr(val_accuracy),
            "kd.val_hash": val_hash,
        }
        client = self.store.client
        with contact.locked(self.store.registry_lock):
            if not client.search_registered_models(f"name = '{registered_name}'"):
                client.create_registered_model(registered_name)
            if _version_of(client, registered_name, manifest["sha256"]) is None:
                saved = models.student(Path(folder), manifest, example, map(Path, beside))
                model_id = models.log(client, self.experiment, self.run_id, saved)
                client.create_model_version(
                    registered_name, f"models:/{model_id}", self.run_id, tags, model_id=model_id
                )
                figures = {"val_accuracy": val_accuracy}
                self._log_of_model(model_id, figures, val_hash, time.time())

    def on_registered(self, name: str, sha256: str) -> dict[str, Any] | None:
        """A student's version."""
        return _plain(_version_of(self.store.client, name, sha256))

    def on_champion(self, name: str) -> dict[str, Any] | None:
        """The champion's version."""
        return _plain(_champion(self.store.client, name))

    def on_fetch(self, uri: str, folder: str) -> dict[str, str]:
        """Download a logged model; returns the folder with its files."""
        return {"folder": models.fetch(uri, folder)}

    def on_promote(
        self, name: str, number: str, over: str | None, decision: str, wins: bool
    ) -> dict[str, bool]:
        """Record a decision, unless the champion has changed since.

        A crash between steps is harmless: the next run makes the same decision again.  The alias
        is set before the tag, so that a version whose tag says champion really was champion.
        """
        client = self.store.client
        with contact.locked(self.store.registry_lock):
            holder = _champion(client, name)
            if (str(holder.version) if holder else None) != over:
                return {"done": False}
            client.set_registered_model_alias(name, "challenger", number)
            if wins:
                client.set_registered_model_alias(name, "champion", number)
            if decision:
                client.set_model_version_tag(name, number, "kd.decision", decision)
        return {"done": True}

    def on_export(
        self,
        folder: str,
        registered_name: str,
        metrics: Mapping[str, float],
        val_hash: str,
        example: list[Any],
        at: float,
    ) -> None:
        """Log the export in a folder to its student's run, point this run and the registry to it.

        A bundle is logged only once; its metrics are updated each time.
        """
        client, name = self.store.client, Path(folder).name
        tags = _export_tags(Path(folder))
        registered = _version_of(client, registered_name, tags["kd.student_sha256"])
        origin = registered.run_id if registered else self.run_id
        model_id = self._logged(tags) or models.log(
            client, self.experiment, origin, models.export(Path(folder), tags, example)
        )
        if self.run_id != origin:
            client.log_outputs(self.run_id, [LoggedModelOutput(model_id, 0)])
        self._log_of_model(model_id, metrics, val_hash, at)
        if registered:
            pointers = {"": f"models:/{model_id}", ".sha256": tags["kd.export_sha256"]}
            for suffix, value in pointers.items():
                key = f"kd.export.{name}{suffix}"
                client.set_model_version_tag(registered_name, registered.version, key, value)

    def _log_of_model(
        self, model_id: str, metrics: Mapping[str, float], val_hash: str, at: float
    ) -> None:
        """Log a model's metrics on the validation split, by which MLflow compares models."""
        owner = {"model_id": model_id, "run_id": self.run_id}
        images = {"dataset_name": "val", "dataset_digest": val_hash[:LONGEST_DIGEST]}
        points = [Metric(k, v, int(at * 1000), 0, **owner, **images) for k, v in metrics.items()]
        self.store.client.log_batch(self.run_id, metrics=points)

    def _logged(self, tags: Mapping[str, str]) -> str | None:
        """The id of the model that was logged with exactly these tags, if any."""
        wanted = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        found = self.store.client.search_logged_models([self.experiment], wanted)
        ready = [model for model in found if model.status == "READY"]
        return str(ready[0].model_id) if ready else None

    def on_end(self, status: str, reason: str) -> None:
        """End the run as FINISHED, FAILED or KILLED; a resumed one keeps its status."""
        if self._monitor is None:
            return
        self._monitor.finish()
        if reason:
            self.on_tags({"kd.end_reason": reason})
        self.store.client.set_terminated(self.run_id, status)


def make_tables(path: Path) -> None:
    """Create a SQLite store's tables or upgrade them; safe to call from many processes at once.

    A new store's tables are created in memory and copied in one transaction, so that a process
    killed meanwhile leaves an empty file, not a broken one.
    """
    from mlflow.store.db import utils
    from sqlalchemy import create_engine
    from sqlalchemy.pool import StaticPool

    with contact.locked(path.with_name(f"{path.name}.lock")):
        engine = create_engine(f"sqlite:///{path}")
        if utils._is_empty_database(engine):
            blank = create_engine("sqlite://", poolclass=StaticPool)
            utils._initialize_tables(blank)
            with closing(sqlite3.connect(path)) as file, closing(blank.raw_connection()) as made:
                memory: Any = made.driver_connection
                memory.backup(file)
            blank.dispose()
        elif utils._get_schema_version(engine) != utils._get_latest_schema_revision():
            utils._upgrade_db(engine)
        engine.dispose()


def _champion(client: mlflow.MlflowClient, name: str) -> Any | None:
    """The version with the alias champion, if any."""
    if not client.search_registered_models(f"name = '{name}'"):
        return None
    holder = client.get_registered_model(name).aliases.get("champion")
    return client.get_model_version(name, holder) if holder else None


def _plain(version: Any | None) -> dict[str, Any] | None:
    """A version as it is sent to the stage: the fields of `kd.tracking.Version`."""
    if version is None:
        return None
    return {"number": str(version.version), "uri": version.source, "tags": dict(version.tags)}


def _version_of(client: mlflow.MlflowClient, name: str, sha256: str) -> Any | None:
    """The registered version with these weights, if any."""
    found = client.search_model_versions(f"name = '{name}' and tags.`kd.sha256` = '{sha256}'")
    return found[0] if found else None


def _export_tags(folder: Path) -> dict[str, str]:
    """Tags that identify the bundle in a folder."""
    parity, student = (
        json.loads((folder / name).read_text("utf-8")) for name in ("parity.json", "student.json")
    )
    return {
        "kd.export": folder.name,
        "kd.export_sha256": parity["sha256"],
        "kd.bundle_sha256": hashlib.sha256((folder / "SHA256SUMS").read_bytes()).hexdigest(),
        "kd.student_sha256": student["sha256"],
    }


def _note(tags: Mapping[str, str]) -> dict[str, str]:
    """A description with a link to Prefect, as MLflow's page shows tags as plain text."""
    page = tags.get("prefect.task_run_url")
    return {"mlflow.note.content": f"[Task run in Prefect]({page})"} if page else {}


def _parts(items: list[T], most: int) -> Iterator[list[T]]:
    for start in range(0, len(items), most):
        yield items[start : start + most]
