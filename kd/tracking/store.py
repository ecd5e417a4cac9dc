"""MLflow, which nothing else imports: the store, one stage's session in it, and the registry.

Only the recorder process (kd/tracking/recorder.py) works here, off the training's path.
"""
# mypy: disallow-untyped-calls=False
# MLflow gives types to half of its functions.

import json
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import mlflow
import psutil
from mlflow.entities import LoggedModelOutput, Metric, Param, RunTag
from mlflow.models import Model, ModelSignature
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.types import Schema, TensorSpec
from mlflow.utils.yaml_utils import read_yaml

from kd.tracking import recorder

T = TypeVar("T")

SAMPLING_SECONDS = 2.0
"""Between two samples of system metrics; MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL sets another."""
LOCAL_PAGES = "http://127.0.0.1:5000"
"""Where `make ui` shows a store that has no server of its own."""
MOST_METRICS, MOST_TAGS, LONGEST_PARAM, LONGEST_TAG = 1000, 100, 6000, 8000
"""What MLflow takes in one batch, and its longest texts."""
SERVED_BY = ("torch", "safetensors", "numpy")


class Store:
    """A store that is ready for runs: its tables made, its dead runs closed."""

    def __init__(self, uri: str, root: Path) -> None:
        """Args: the store's URI, and the repository whose commit and dvc.lock are noted."""
        self.uri = uri
        self.root = root
        if path := recorder.sqlite_path(uri):
            make_tables(path)
        mlflow.set_tracking_uri(uri)
        self.client = mlflow.MlflowClient(uri, os.environ.get("MLFLOW_REGISTRY_URI") or uri)
        self.registry_lock = recorder.folder() / f"{recorder.digest(uri)}.registry.lock"

    def begin(self, start: Mapping[str, Any]) -> "Session":
        """Begin a run, after closing those that dead processes of this machine left RUNNING."""
        experiment = self._experiment(start["experiment"])
        self._reap(experiment)
        name = "/".join(filter(None, (start["stage"], start["name"])))
        tags = {
            "kd.stage": start["stage"],
            "kd.name": start["name"] or start["stage"],
            **_process_tags(start["pid"]),
            **_git_tags(self.root),
            **_dvc_tags(self.root, start["stage"], start["name"]),
            **start["tags"],
            **({"mlflow.parentRunId": start["parent"]} if start["parent"] else {}),
        }
        tags = {key: str(value)[:LONGEST_TAG] for key, value in tags.items()}
        run = self.client.create_run(experiment, int(start["time"] * 1000), tags, name)
        session = Session(self, experiment, run.info.run_id, start["pid"])
        session.log_params(start["params"])
        return session

    def _experiment(self, name: str) -> str:
        """The id of the experiment `name`, made where it is missing."""
        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self.client.create_experiment(name, self._artifacts()))
            except mlflow.MlflowException:
                found = self.client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)  # it was there, or another recorder was faster

    def _artifacts(self) -> str | None:
        """Where files go: beside a SQLite file, to .kd for another database, as a server says."""
        if self.uri.startswith(("http://", "https://", "databricks")):
            return None
        path = recorder.sqlite_path(self.uri)
        return str((path.parent if path else self.root / ".kd") / "mlruns")

    def _reap(self, experiment: str) -> None:
        """End the runs whose process and recorder were both killed."""
        running = self.client.search_runs(
            [experiment],
            f"attributes.status = 'RUNNING' and tags.`kd.host` = '{socket.gethostname()}'",
        )
        for run in running:
            tags = run.data.tags
            if "kd.pid" in tags and not _lives(tags):
                reason = f"process {tags['kd.pid']} is gone; a later start found its run open"
                self.client.set_tag(run.info.run_id, "kd.end_reason", reason)
                self.client.set_terminated(run.info.run_id, "KILLED")


class Session:
    """One stage's run."""

    def __init__(self, store: Store, experiment: str, run_id: str, pid: int) -> None:
        """Args: the store, the experiment's id, the run's id, the stage's process."""
        self.store = store
        self.experiment = experiment
        self.run_id = run_id
        self.pid = pid
        self._monitor = SystemMetricsMonitor(
            run_id, sampling_interval=SAMPLING_SECONDS, tracking_uri=store.uri
        )
        self._monitor.start()

    @property
    def url(self) -> str:
        """The run's page."""
        uri = recorder.without_password(self.store.uri)
        pages = uri if uri.startswith("http") else LOCAL_PAGES
        return f"{pages.rstrip('/')}/#/experiments/{self.experiment}/runs/{self.run_id}"

    def do(self, what: str, **fields: Any) -> None:
        """Do what the stage says: metrics, curve, tags, file, model."""
        getattr(self, f"log_{what}")(**fields)

    def log_params(self, params: Mapping[str, str]) -> None:
        """Log params that never change afterwards."""
        for part in _parts([Param(k, v[:LONGEST_PARAM]) for k, v in params.items()], MOST_TAGS):
            self.store.client.log_batch(self.run_id, params=part)

    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags."""
        for part in _parts([RunTag(k, str(v)[:LONGEST_TAG]) for k, v in tags.items()], MOST_TAGS):
            self.store.client.log_batch(self.run_id, tags=part)

    def log_metrics(self, step: int, metrics: Mapping[str, float], time: float) -> None:
        """Log one point of each metric."""
        self.log_curve([(step, metrics)], time)

    def log_curve(self, points: Sequence[tuple[int, Mapping[str, float]]], time: float) -> None:
        """Log several points of each metric."""
        at = int(time * 1000)
        every = [
            Metric(key, value, at, step) for step, row in points for key, value in row.items()
        ]
        for part in _parts(every, MOST_METRICS):
            self.store.client.log_batch(self.run_id, metrics=part)

    def log_file(self, path: str, folder: str) -> None:
        """Keep a copy of a file."""
        self.store.client.log_artifact(self.run_id, path, folder or None)

    def log_model(
        self,
        folder: str,
        registered_name: str,
        val_accuracy: float,
        val_hash: str,
        example: list[Any],
    ) -> None:
        """Log and register the student in a folder, and decide who is champion."""
        manifest = json.loads(Path(folder, "manifest.json").read_text())
        tags = {
            "kd.sha256": manifest["sha256"],
            "kd.val_accuracy": repr(val_accuracy),
            "kd.val_hash": val_hash,
        }
        client = self.store.client
        with recorder.locked(self.store.registry_lock):
            if not client.search_registered_models(f"name = '{registered_name}'"):
                client.create_registered_model(registered_name)
            found = _version_of(client, registered_name, manifest["sha256"])
            if found is None:
                model_id = self._save_model(Path(folder), manifest, example)
                found = client.create_model_version(
                    registered_name, f"models:/{model_id}", self.run_id, tags, model_id=model_id
                )
            promote(client, registered_name, str(found.version))

    def _save_model(self, folder: Path, manifest: Mapping[str, Any], example: list[Any]) -> str:
        """Log the student as a model; its id.

        By a loader module of this package, because `mlflow.pytorch` would trace the model
        again (torch.export) or pickle it, and the recorder would have to import torch.
        """
        import numpy as np

        images_NHWc = np.asarray(example, np.uint8)
        shape = (-1, *images_NHWc.shape[1:])
        signature = ModelSignature(
            inputs=Schema([TensorSpec(np.dtype(np.uint8), shape)]),
            outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, len(manifest["class_names"])))]),
        )
        client = self.store.client
        logged = client.create_logged_model(self.experiment, "student", self.run_id)
        with tempfile.TemporaryDirectory() as temporary:
            data = Path(temporary, "data")
            data.mkdir()
            for file in ("model.safetensors", "manifest.json"):
                shutil.copy(folder / file, data)
            mlflow.pyfunc.save_model(
                f"{temporary}/model",
                loader_module="kd.tracking.student",
                data_path=str(data),
                mlflow_model=Model(
                    artifact_path=logged.artifact_location,
                    model_uuid=logged.model_id,
                    model_id=logged.model_id,
                    run_id=self.run_id,
                ),
                signature=signature,
                input_example=images_NHWc,
                pip_requirements=[f"{package}=={version(package)}" for package in SERVED_BY],
            )
            client.log_model_artifacts(logged.model_id, f"{temporary}/model")
        client.log_outputs(self.run_id, [LoggedModelOutput(logged.model_id, 0)])
        client.finalize_logged_model(logged.model_id, "READY")
        return str(logged.model_id)

    def end(self, status: str, reason: str) -> None:
        """End the run: FINISHED, FAILED or KILLED, and why."""
        self._monitor.finish()
        if reason:
            self.log_tags({"kd.end_reason": reason})
        self.store.client.set_terminated(self.run_id, status)


def make_tables(path: Path) -> None:
    """Bring a SQLite store's tables to MLflow's version.  Any number of processes may ask at once.

    A new store's tables are made in memory and copied in by one transaction, so that a process
    killed meanwhile leaves an empty file and not a broken one.
    """
    from mlflow.store.db import utils
    from sqlalchemy import create_engine
    from sqlalchemy.pool import StaticPool

    with recorder.locked(path.with_name(f"{path.name}.lock")):
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


def promote(client: mlflow.MlflowClient, name: str, number: str) -> None:
    """Make a version the challenger, and the champion if it beats the present one.

    Two accuracies are compared on the same validation images only.  On others the champion
    stays, and the tag kd.decision says how to replace it by hand.
    """
    client.set_registered_model_alias(name, "challenger", number)
    challenger = client.get_model_version(name, number)
    holder = client.get_registered_model(name).aliases.get("champion")
    champion = client.get_model_version(name, holder) if holder else None
    decision, wins = _decide(challenger, champion)
    client.set_model_version_tag(name, number, "kd.decision", decision)
    if wins:
        client.set_registered_model_alias(name, "champion", number)


def _decide(challenger: Any, champion: Any) -> tuple[str, bool]:
    """What to say of a challenger, and whether it becomes champion."""
    if champion is None:
        return "champion: the first of its name", True
    if champion.version == challenger.version:
        return challenger.tags.get("kd.decision", "champion"), False
    if champion.tags.get("kd.val_hash") != challenger.tags["kd.val_hash"]:
        return (
            f"not compared: version {champion.version} was measured on other validation images; "
            "to replace it, give this version the alias champion",
            False,
        )
    new, old = (float(one.tags["kd.val_accuracy"]) for one in (challenger, champion))
    verdict = f"validation accuracy {new:.4f} against {old:.4f} of version {champion.version}"
    return (f"champion: {verdict}", True) if new > old else (f"challenger: {verdict}", False)


def _version_of(client: mlflow.MlflowClient, name: str, sha256: str) -> Any | None:
    """The registered version with these weights, if there is one."""
    found = client.search_model_versions(f"name = '{name}' and tags.`kd.sha256` = '{sha256}'")
    return found[0] if found else None


def _process_tags(pid: int) -> dict[str, str]:
    """Who makes the run; a pid alone could be another process's by tomorrow."""
    tags = {"kd.host": socket.gethostname(), "kd.pid": str(pid)}
    with suppress(psutil.NoSuchProcess):
        tags["kd.pid_born"] = str(psutil.Process(pid).create_time())
    return tags


def _lives(tags: Mapping[str, str]) -> bool:
    """Whether the process that a run's tags name is there (clocks may drift a little)."""
    try:
        born = psutil.Process(int(tags["kd.pid"])).create_time()
    except psutil.NoSuchProcess:
        return False
    return bool(abs(born - float(tags.get("kd.pid_born", 0))) < 5)


def _git_tags(root: Path) -> dict[str, str]:
    """The commit, and whether files other than dvc.lock (which the pipeline writes) differ."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "HEAD")
    if not commit:
        return {}
    dirty = bool(git("status", "--porcelain", "--", ".", ":!dvc.lock"))
    return {"git.commit": commit, "git.dirty": str(dirty).lower()}


def _dvc_tags(root: Path, stage: str, name: str | None) -> dict[str, str]:
    """Hashes of what the stage reads, as dvc.lock has them from the stages that made it."""
    try:
        lock, pipeline = (
            read_yaml(str(root), file)["stages"] for file in ("dvc.lock", "dvc.yaml")
        )
        made = {o["path"]: o["md5"] for made_by in lock.values() for o in made_by.get("outs", ())}
        deps = [_filled_in(dep, name or "") for dep in _deps(pipeline[stage])]
    except Exception:
        return {}  # no pipeline here, or another stage's DVC is writing dvc.lock just now
    return {
        f"dvc.dep.{path}": md5
        for path, md5 in made.items()
        if any(path == dep or path.startswith(f"{dep}/") for dep in deps)
    }


def _filled_in(dep: str, name: str) -> str:
    return re.sub(r"\$\{(item|key)\b[^}]*\}", name, dep)


def _deps(entry: Mapping[str, Any]) -> Iterator[str]:
    """The dependencies that a stage of dvc.yaml (plain, matrix or foreach) lists."""
    for dep in entry.get("do", entry).get("deps", ()):
        yield dep if isinstance(dep, str) else next(iter(dep))


def _parts(items: list[T], most: int) -> Iterator[list[T]]:
    for start in range(0, len(items), most):
        yield items[start : start + most]
