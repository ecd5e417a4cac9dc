"""A stage's side of tracking: what it reports of its run, and asks of the registry."""

import itertools
import logging
import os
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd import disk
from kd.tracking import contact
from kd.tracking.address import TrackingError, prepare_store, repository, without_password
from kd.tracking.wire import Line

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

PATIENCE = 600.0
"""Seconds to wait for the recorder, which may be uploading a model."""
SILENCE = 20.0
"""Seconds of waiting after which a stage logs what it is waiting for."""
ENVIRONMENT_TAGS = {
    "kd.pipeline_run": "KD_PIPELINE_RUN",
    "prefect.flow_run_id": "KD_FLOW_RUN_ID",
    "prefect.task_run_id": "KD_TASK_RUN_ID",
    "prefect.task_run_url": "KD_TASK_RUN_URL",
    "dvc.stage": "DVC_STAGE",
    "dvc.exp_name": "DVC_EXP_NAME",
}


@dataclass(frozen=True)
class Version:
    """A registered student."""

    number: str
    uri: str
    """Its model's URI in MLflow."""
    tags: Mapping[str, str]

    @property
    def sha256(self) -> str:
        """SHA-256 of its weights, which identifies a student."""
        return self.tags.get("kd.sha256", "")

    @property
    def decision(self) -> str:
        """The decision that `Run.promote` recorded last; "" if none."""
        return self.tags.get("kd.decision", "")


class Run:
    """One stage's run.

    Only the first `log_epoch`, `id`, `url` and the registry's queries wait for MLflow.
    """

    def __init__(self, line: Line, uri: str, tags: Mapping[str, str]) -> None:
        """Args: the connection to the recorder, the URI of the store it writes to, the tags."""
        self._line = line
        self._uri = uri
        self.tags = tags
        """What the run is found by; runs below it should have the same."""
        self._started: dict[str, Any] | None = None
        self._count = itertools.count()
        self._last_steps: dict[str, int] = {}
        """The last step of each metric that has a curve."""
        self.error: str | None = None
        """Why the record is incomplete, if it is; losing MLflow mid-run does not stop training."""

    @cached_property
    def _scratch(self) -> "tempfile.TemporaryDirectory[str]":
        """Created on first use: few stages need it."""
        return disk.temporary()

    @property
    def id(self) -> str | None:
        """MLflow's run id."""
        return self._begun().get("run_id")

    @property
    def url(self) -> str | None:
        """The run's page in MLflow; for a local file, the page once `make ui` serves it."""
        return self._begun().get("url")

    def log_epoch(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a point to each metric's curve; call it once per epoch, not per step."""
        self._begun()
        self.log_curve({step: metrics})

    def log_final(self, metrics: Mapping[str, float]) -> None:
        """Log the figures that runs are compared by, under names shared by all runs.

        A metric that has a curve is logged at its last step, because MLflow shows a metric's value
        at its highest step: log curves first.  Any other is logged at step 0, because MLflow draws
        bars, not curves, where all runs have nothing but that.
        """
        points: dict[int, dict[str, float]] = {}
        for name, value in metrics.items():
            points.setdefault(self._last_steps.get(name, 0), {})[name] = value
        self._log(points)

    def log_curve(self, points: Mapping[int, Mapping[str, float]]) -> None:
        """Log whole curves at once: metrics by step."""
        for step, metrics in points.items():
            for name in metrics:
                self._last_steps[name] = max(step, self._last_steps.get(name, 0))
        self._log(points)

    def _log(self, points: Mapping[int, Mapping[str, float]]) -> None:
        floats = [(step, _floats(metrics)) for step, metrics in points.items()]
        self._tell("metrics", points=floats, time=time.time())

    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Add tags: long text, and values to search runs by."""
        self._tell("tags", tags=dict(tags))

    def log_file(self, path: Path | str, folder: str = "") -> None:
        """Upload a file or folder as an artifact; it must stay in place until the run ends.

        Raises:
            FileNotFoundError: it does not exist.
        """
        if not Path(path).exists():
            raise FileNotFoundError(f"{path} cannot be logged: it does not exist")
        self._tell("file", path=str(Path(path).resolve()), folder=folder)

    def log_figure(self, figure: "Figure", name: str) -> None:
        """Upload a figure as figures/<name>.png."""
        from kd import figures

        path = Path(self._scratch.name) / str(next(self._count)) / f"{name}.png"
        path.parent.mkdir()
        figures.save(figure, path)
        self.log_file(path, "figures")

    def log_model(
        self,
        folder: Path | str,
        *,
        registered_name: str,
        val_accuracy: float,
        val_hash: str,
        example: "NDArray[np.uint8]",
        beside: Sequence[Path] = (),
    ) -> None:
        """Log the student as a model that `mlflow.pyfunc.load_model` loads, and register it.

        A student that is already registered (by the SHA-256 of its weights) keeps its version.
        kd/promotion.py decides which version is champion; `promote` records that.

        Args:
            folder: Contains model.safetensors and manifest.json.
            registered_name: The name in the registry shared by all students of a pipeline.
            val_accuracy: Validation accuracy, in [0, 1].
            val_hash: SHA-256 of the validation split that it was measured on.
            example: Two or more images (N, H, W, channels), the model's input example.
            beside: Further files to log with it, which must stay until the run ends.
        """
        self._tell(
            "model",
            folder=str(Path(folder).resolve()),
            registered_name=registered_name,
            val_accuracy=val_accuracy,
            val_hash=val_hash,
            example=example.tolist(),
            beside=[str(path.resolve()) for path in beside],
        )

    def registered(self, registered_name: str, sha256: str) -> Version | None:
        """A student's version in the registry; None if it is not registered.

        Raises:
            TrackingError: MLflow does not answer; the registry's other queries raise it, too.
        """
        return _version(self._ask("registered", name=registered_name, sha256=sha256))

    def champion(self, registered_name: str) -> Version | None:
        """The version with the alias champion; None if there is none."""
        return _version(self._ask("champion", name=registered_name))

    def fetch(self, uri: str, folder: Path) -> Path:
        """Download a logged model to `folder`.

        Args:
            uri: The model's URI, such as models:/m-...
            folder: Where to put it.

        Returns:
            The folder inside with the model's own files.
        """
        return Path(self._ask("fetch", uri=uri, folder=str(folder.resolve()))["folder"])

    def promote(
        self,
        registered_name: str,
        challenger: Version,
        champion: Version | None,
        decision: str,
        wins: bool,
    ) -> bool:
        """Make a version the challenger, record the decision, and make it champion if it wins.

        Args:
            registered_name: See `log_model`.
            challenger: The version that was compared.
            champion: The version that it was compared with.
            decision: Stored as the version's tag kd.decision; "" leaves the tag unchanged.
            wins: Whether it becomes champion.

        Returns:
            False if the champion has changed in the meantime; then nothing was done.
        """
        answer = self._ask(
            "promote",
            name=registered_name,
            number=challenger.number,
            over=champion.number if champion else None,
            decision=decision,
            wins=wins,
        )
        return bool(answer["done"])

    def scratch(self) -> Path:
        """A temporary folder that is deleted when the run ends."""
        return Path(tempfile.mkdtemp(dir=self._scratch.name))

    def log_export(
        self,
        folder: Path | str,
        *,
        registered_name: str,
        metrics: Mapping[str, float],
        val_hash: str,
        example: "NDArray[np.uint8]",
    ) -> None:
        """Log an export as a separate model, which runs the file in the format's runtime.

        The model belongs to its student's run, and the student's version in the registry gets
        the tags kd.export.<name> (the model's URI) and kd.export.<name>.sha256.  If the student
        is not registered, the model belongs to this run.  Each bundle is logged only once.

        Args:
            folder: The bundle, artifacts/exports/<name>, which must stay until the run ends.
            registered_name: The name of the pipeline's students in the registry.
            metrics: The figures that exports are compared by.
            val_hash: SHA-256 of the validation split that they were measured on.
            example: Two or more pictures (N, H, W, channels), the model's input example.
        """
        self._tell(
            "export",
            folder=str(Path(folder).resolve()),
            registered_name=registered_name,
            metrics=_floats(metrics),
            val_hash=val_hash,
            example=example.tolist(),
            at=time.time(),
        )

    def _begun(self) -> dict[str, Any]:
        """The recorder's reply to the start of the run; the first call waits for it.

        Raises:
            TrackingError: the run could not be started.
        """
        if self._started is None:
            try:
                self._started = self._line.receive(PATIENCE)
            except OSError as error:
                raise TrackingError(
                    self._uri, f"{error} (its recorder's log is in {contact.folder()})"
                ) from error
            if reason := self._started.get("error"):
                raise TrackingError(self._uri, reason)
        return self._started

    def _tell(self, what: str, **fields: Any) -> None:
        if self.error is None:
            try:
                self._line.send({"do": what, **fields})
            except OSError as error:
                self._lost(error)

    def _ask(self, what: str, **fields: Any) -> Any:
        """Wait for the recorder's answer; it first processes all earlier messages."""
        self._begun()
        self._tell(what, **fields)
        answer: dict[str, Any] = {}
        if self.error is None:
            try:
                answer = self._line.receive(PATIENCE)
            except OSError as error:
                self._lost(error)
        if failed := self.error or answer.get("error"):
            raise TrackingError(self._uri, failed)
        return answer["answer"]

    def _lost(self, reason: object) -> None:
        self.error = str(reason)
        where = without_password(self._uri)
        log.warning("MLflow at %s no longer records this stage: %s", where, reason)

    def _end(self, status: str, reason: str) -> None:
        """Send the last message, and wait until everything has been written."""
        try:
            self._begun()
            self._tell("end", status=status, reason=reason)
            if self.error is None and self._line.is_silent(SILENCE):
                where = without_password(self._uri)
                log.warning("waiting for MLflow at %s to write the rest of the run", where)
            if self.error is None and (lost := self._line.receive(PATIENCE).get("error")):
                self._lost(lost)
        except OSError as error:
            self._lost(error)
        finally:
            self._line.close()
            if "_scratch" in vars(self):
                self._scratch.cleanup()


class NullRun(Run):
    """The run of a stage that is not tracked: accepts every call and records nothing."""

    def __init__(self) -> None:
        self.tags = {}
        self.error = None
        self._last_steps = {}

    def _begun(self) -> dict[str, Any]:
        return {}

    def _tell(self, what: str, **fields: Any) -> None:
        pass

    def _ask(self, what: str, **fields: Any) -> Any:
        raise RuntimeError("a run that is not tracked has no registry to ask")

    def log_file(self, path: Path | str, folder: str = "") -> None:
        """Do nothing, even if the file is missing."""

    def log_figure(self, figure: "Figure", name: str) -> None:
        """Do nothing."""


@contextmanager
def run(
    stage: str,
    name: str | None = None,
    *,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    enabled: bool = True,
    parent: str | None = None,
    resume: bool = False,
) -> Iterator[Run]:
    """Track the block as the run <stage>[/<name>].

    An exception ends the run as FAILED (an interrupt as KILLED) with the reason in the tag
    kd.end_reason; if the process is killed, the run ends as KILLED.

    Args:
        stage: The stage's name; with `name`, the run's name, and the tags kd.stage and kd.name.
        name: The key within the stage: the assistant, the baseline, the export.
        params: Nested as in params.yaml; logged flat with dots, `recipe.optimizer.lr`.
        tags: Further tags to find the run by: kd.pipeline, kd.role, kd.data_hash.
        enabled: False runs the same block without MLflow.
        parent: Id of the parent run; default: KD_PARENT_RUN, which the flow sets.
        resume: Add to the last run that has all of `tags`, and leave its status unchanged; if
            there is none, a new run begins.

    Raises:
        TrackingError: the store cannot be reached, or refuses the run.
    """
    if not enabled:
        yield NullRun()
        return
    line, uri = start()
    first_word = {
        "stage": stage,
        "name": name,
        "params": _flat(params),
        "tags": {**_environment_tags(), **tags},
        "parent": parent or os.environ.get("KD_PARENT_RUN"),
        "resume": dict(tags) if resume else None,
        "experiment": os.environ.get("MLFLOW_EXPERIMENT_NAME", "kd"),
        "pid": os.getpid(),
        "time": time.time(),
    }
    try:
        line.send(first_word)
    except OSError as error:
        raise TrackingError(uri, error) from error
    this = Run(line, uri, tags)
    try:
        yield this
    except BaseException as error:
        killed = isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit)
        with suppress(TrackingError):  # the stage's own error must be raised instead
            this._end("KILLED" if killed else "FAILED", _reason(error))
        raise
    this._end("FINISHED", "")


def start() -> tuple[Line, str]:
    """Connect to this machine's recorder, started if necessary; also returns the store's URI.

    To save time, call it early and close the connection: the recorder then imports MLflow while
    the caller imports torch.

    Raises:
        TrackingError: MLflow is not installed, its server does not answer, or the recorder
            cannot be started.
    """
    uri = prepare_store()
    try:
        return contact.connect(uri, repository()), uri
    except OSError as error:
        raise TrackingError(uri, error) from error


def _reason(error: BaseException) -> str:
    """Why a run ended: the error, or the signal that kd/signals.py turned into SystemExit."""
    if isinstance(error, SystemExit):
        for each in signal.Signals:
            if error.code == 128 + each:
                return f"stopped by {each.name}"
    return f"{type(error).__name__}: {error}"


def _version(answer: Mapping[str, Any] | None) -> Version | None:
    return Version(**answer) if answer else None


def _environment_tags() -> dict[str, str]:
    return {tag: os.environ[key] for tag, key in ENVIRONMENT_TAGS.items() if os.environ.get(key)}


def _floats(metrics: Mapping[str, float]) -> dict[str, float]:
    """Convert all values, such as NumPy's and torch's scalars, to plain floats."""
    return {key: float(value) for key, value in metrics.items()}


def _flat(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten nested params to one level of strings, keys joined by dots; drops None."""
    flat: dict[str, str] = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            flat[f"{prefix}{key}"] = str(value)
    return flat
