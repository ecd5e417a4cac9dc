"""Models that MLflow can load and serve: the student and each of its exports.

They are saved as files and a loader module, not pickled or traced, so that the recorder needs
neither torch nor any format's runtime.
"""
# mypy: disallow-untyped-calls=False
# MLflow gives types to half of its functions.

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from mlflow.entities import LoggedModelOutput
from mlflow.models import Model, ModelSignature
from mlflow.types import Schema, TensorSpec
from numpy.typing import NDArray

from kd import disk

# N pictures, C classes, H W picture

RUN_BY = {
    ".onnx": ("onnxruntime", "numpy"),
    ".pte": ("executorch", "torch", "numpy"),
    ".tflite": ("ai-edge-litert", "numpy"),
    ".mlpackage": ("numpy",),
}
"""Packages needed to run an export with its classify.py, by suffix.  Core ML files are logged like
the others, but run only on Apple devices."""


@dataclass(frozen=True)
class Saved:
    """A model to be logged."""

    name: str
    files: Sequence[Path]
    """Files and folders for its loader, copied into one folder."""
    loader: str
    """The module whose `_load_pyfunc` loads them."""
    packages: Sequence[str]
    """Packages that this module imports."""
    outputs: Schema
    example_NHWc: NDArray[np.uint8]
    """Input example: two or more pictures."""
    code: Path | None = None
    """The loader's source, to be logged too; None for a module of this package."""
    tags: Mapping[str, str] | None = None


def student(
    folder: Path, manifest: Mapping[str, Any], example: list[Any], beside: Iterable[Path] = ()
) -> Saved:
    """The student in `folder`: pictures in, logits out; needs `kd` to run."""
    logits = TensorSpec(np.dtype(np.float32), (-1, len(manifest["class_names"])))
    return Saved(
        name="student",
        files=[folder / "model.safetensors", folder / "manifest.json", *beside],
        loader="kd.tracking.student",
        packages=("torch", "safetensors", "numpy"),
        outputs=Schema([logits]),
        example_NHWc=np.asarray(example, np.uint8),
    )


def export(folder: Path, tags: Mapping[str, str], example: list[Any]) -> Saved:
    """The export in the bundle `folder`: pictures in, labels and probabilities out.

    The bundle's classify.py runs the file in its own runtime; `kd` is not needed.
    """
    form = json.loads((folder / "preprocessing.json").read_text("utf-8"))
    probabilities = (-1, form["output"]["shape"][-1])
    return Saved(
        name=f"exports-{folder.name}",
        files=[path for path in folder.iterdir() if path.name[0] not in "._"],
        loader="classify",
        packages=RUN_BY[Path(form["file"]).suffix],
        outputs=Schema(
            [
                TensorSpec(np.dtype(str), (-1,), "label"),
                TensorSpec(np.dtype(np.float32), probabilities, "probabilities"),
            ]
        ),
        example_NHWc=np.asarray(example, np.uint8),
        code=folder / "classify.py",
        tags=tags,
    )


def log(client: mlflow.MlflowClient, experiment: str, run_id: str, saved: Saved) -> str:
    """Log a model as an output of a run; returns the model's id."""
    tags = dict(saved.tags or {})
    logged = client.create_logged_model(experiment, saved.name, run_id, tags)
    pictures = TensorSpec(np.dtype(np.uint8), (-1, *saved.example_NHWc.shape[1:]))
    with disk.temporary() as temporary:
        data = Path(temporary, "data")
        data.mkdir()
        for path in saved.files:
            (shutil.copytree if path.is_dir() else shutil.copy)(path, data / path.name)
        mlflow.pyfunc.save_model(
            f"{temporary}/model",
            loader_module=saved.loader,
            data_path=str(data),
            code_paths=[str(saved.code)] if saved.code else None,
            mlflow_model=Model(
                artifact_path=logged.artifact_location,
                model_uuid=logged.model_id,
                model_id=logged.model_id,
                run_id=run_id,
            ),
            signature=ModelSignature(inputs=Schema([pictures]), outputs=saved.outputs),
            input_example=saved.example_NHWc,
            pip_requirements=list(_pinned(saved.packages)),
        )
        client.log_model_artifacts(logged.model_id, f"{temporary}/model")
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, 0)])
    client.finalize_logged_model(logged.model_id, "READY")
    return str(logged.model_id)


def fetch(uri: str, folder: str) -> str:
    """Download a logged model to `folder`; returns the folder inside with its loader's files."""
    where = mlflow.artifacts.download_artifacts(uri, dst_path=folder)
    return str(Path(where, Model.load(where).flavors["python_function"]["data"]))


def _pinned(packages: Iterable[str]) -> Iterable[str]:
    """The packages pinned to their installed versions; unpinned if not installed."""
    for package in packages:
        try:
            yield f"{package}=={version(package)}"
        except PackageNotFoundError:
            yield package
