"""Where the stages store their results: folders, atomic writes, JSON records, tensors.

Nothing is pickled: tensors are safetensors or .npy files, records JSON, other tables CSV.  Still,
a network's manifest may name code to be imported (docs/security.md).
"""

import csv
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kd import FAMILIES
from kd.component import ConfigError
from kd.disk import atomic as atomic  # re-exported, as are those below
from kd.disk import sha256 as sha256
from kd.train import Epoch
from kd.workspace import CHECKPOINTS as CHECKPOINTS
from kd.workspace import DATA as DATA
from kd.workspace import ROOT as ROOT
from kd.workspace import folder as folder

LEARNING = (
    "roles.py",
    "train",
    "recipe.py",
    "ensemble.py",
    "evaluate.py",
    "methods",
    "models",
    "data",
)


class ArtifactError(ConfigError):
    """A file from an earlier stage is missing, damaged, or not the one that is needed."""


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record, keeping the order of keys and every bit of a float."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a record.

    Raises:
        ArtifactError: the file is missing or not a JSON object; names the stage to run.
    """
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing: {remedy(path)}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} is damaged ({error}): {remedy(path)}") from None
    if not isinstance(record, dict):
        raise ArtifactError(f"{path} is not a record: {remedy(path)}")
    return record


def data_record() -> dict[str, Any]:
    """The record of the images that the stage `data` prepared."""
    return read_json(DATA / "data.json")


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows with the same keys as a CSV with a header."""
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_curves(path: Path, history: Sequence[Epoch]) -> None:
    """Write the validated epochs as a CSV, one row each."""
    write_csv(
        path,
        [
            {
                "epoch": epoch.number,
                "step": epoch.step,
                "lr": epoch.lr,
                "train_loss": epoch.train_loss,
                **{f"val_{name}": value for name, value in epoch.validation.items()},
            }
            for epoch in history
            if epoch.validation
        ],
    )


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors as safetensors; shared storage is written once for each name."""
    from safetensors.torch import save

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    seen: set[int] = set()
    for name, tensor in plain.items():
        if (storage := tensor.untyped_storage().data_ptr()) in seen:
            plain[name] = tensor.clone()
        seen.add(storage)
    with atomic(path) as temporary:
        temporary.write_bytes(save(plain, dict(metadata or {})))  # raises OSError on a full disk


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Named tensors and metadata of a safetensors file.

    Raises:
        ArtifactError: the file is missing or damaged; the message names the stage to run.
    """
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise ArtifactError(f"{path} is missing: {remedy(path)}")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except SafetensorError as error:
        raise ArtifactError(f"{path} is damaged ({error}): {remedy(path)}") from None


def digest(record: object) -> str:
    """SHA-256 of plain data, independent of the order of keys."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def code_digest(names: Sequence[str] = LEARNING, own: Sequence[str] = ()) -> str:
    """SHA-256 over sources; by default those that decide what is learned, which DVC watches.

    Args:
        names: Files and folders of this package.
        own: SHA-256 of each source file of the user's own.
    """
    package = Path(__file__).parent
    whole = hashlib.sha256()
    for name in names:
        path = package / name
        for source in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            whole.update(str(source.relative_to(package)).encode() + source.read_bytes())
    whole.update("".join(own).encode())
    return whole.hexdigest()


def save_model(path: Path, model: nn.Module) -> str:
    """Write a model's parameters and buffers; return the file's SHA-256."""
    write_tensors(path, model.state_dict())
    return sha256(path)


def load_model(path: Path, model: nn.Module) -> nn.Module:
    """Load a file's parameters and buffers into `model`; return it in eval mode.

    Raises:
        ArtifactError: the file is missing, damaged, or for another model.
    """
    tensors, _ = read_tensors(path)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ArtifactError(f"{path} is for another model ({error}): {remedy(path)}") from None
    return model.eval()


def remedy(path: Path) -> str:
    """How to make a missing or damaged file again."""
    if ROOT.name not in path.parts:
        return "delete it and run the stage again"
    stage, *rest = path.parts[path.parts.index(ROOT.name) + 1 :]
    name = f"@{rest[0]}" if stage in FAMILIES and rest else ""
    return f"run `dvc repro {stage}{name}`"


def state_path(run_name: str, inputs: object, suffix: str) -> Path:
    """The file from which a killed stage resumes; it exists until the result is written.

    Args:
        run_name: The stage's.
        inputs: Everything that decides the result, as plain data.
        suffix: The file's.
    """
    return CHECKPOINTS / run_name / f"{digest(inputs)[:32]}{suffix}"


def check_space(folder: Path, wanted: int) -> None:
    """Refuse to start if the disk lacks `wanted` bytes.

    Raises:
        ArtifactError: names the folder and what it needs.
    """
    free = shutil.disk_usage(folder).free
    if free < wanted + 2**26:  # and some for records
        raise ArtifactError(
            f"{folder.absolute()} has {free / 2**20:.0f} MiB free and needs "
            f"{wanted / 2**20 + 64:.0f}: free some space (`make clean` drops old checkpoints and "
            "targets, the flow `housekeeping` artifacts that no commit names: docs/schedules.md)"
        )
