"""Where the stages store their results: folders, atomic writes, JSON records, tensors.

Nothing is pickled: tensors are safetensors or .npy files, records JSON, other tables CSV.
"""

import csv
import hashlib
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock  # a dependency of PyTorch
from torch import Tensor, nn

from kd import FAMILIES, git
from kd.component import ConfigError
from kd.disk import atomic as atomic  # re-exported, as are those below
from kd.disk import sha256 as sha256
from kd.ensemble import digest_of_tensors
from kd.train import Epoch
from kd.workspace import CHECKPOINTS as CHECKPOINTS
from kd.workspace import DATA as DATA
from kd.workspace import ROOT as ROOT
from kd.workspace import folder as folder

MACHINE = Path(".kd/machine")
"""Measurements on this machine that decide how it trains."""
TARGETS = Path(".kd/targets")
"""Members' logits, shared by all networks with the same teachers."""
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
    with atomic(path) as temporary, temporary.open("w", newline="") as file:
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


class DiskCheckpoint:
    """fit()'s checkpoints on disk, valid for one set of inputs.

    A checkpoint is one safetensors file whose metadata hold the epochs done, the machine, and a
    checksum over everything, so state and history cannot diverge.  The previous one is kept: if
    the newest is damaged, training resumes from that one; if both are, it starts over.
    """

    def __init__(self, run_name: str, inputs: object) -> None:
        """Args: the run name, and all that decides the result, as plain data."""
        self.path = state_path(run_name, inputs, ".safetensors")
        self.before = self.path.with_suffix(".before")

    def load(self) -> tuple[dict[str, Tensor], list[Epoch]] | None:
        """The last good state and the epochs it covers, or None for a fresh start."""
        for path in (self.path, self.before):
            if path.exists():
                try:
                    return read_state(path)
                except ArtifactError as error:
                    print(f"warning: {error}", flush=True)
                    path.unlink()  # else the next save would replace a good one by it
        return None

    def save(self, state: dict[str, Tensor], history: list[Epoch]) -> None:
        """Write a checkpoint atomically, and keep the previous one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self.path.replace(self.before)
        metadata = {
            "history": json.dumps([asdict(epoch) for epoch in history]),
            "machine": json.dumps(machine()),
            "inputs": self.path.stem,
        }
        write_tensors(self.path, state, {**metadata, "checksum": checksum_of(state, metadata)})

    def remove(self) -> None:
        """Delete the checkpoints, once the result is written."""
        self.path.unlink(missing_ok=True)
        self.before.unlink(missing_ok=True)


def read_state(path: Path) -> tuple[dict[str, Tensor], list[Epoch]]:
    """A checkpoint's tensors and epochs; warns if another machine wrote them.

    Raises:
        ArtifactError: the file is damaged, or for other inputs.
    """
    state, metadata = read_tensors(path)
    if metadata.pop("checksum", None) != checksum_of(state, metadata):
        raise ArtifactError(f"{path} fails its checksum: ignoring it")
    if metadata.get("inputs") != path.stem:
        raise ArtifactError(f"{path} is another training's checkpoint, renamed: ignoring it")
    there, here = json.loads(metadata["machine"]), machine()
    if other := [name for name in here if here[name] != there.get(name)]:
        changes = ", ".join(f"{name} {there.get(name)}, here {here[name]}" for name in other)
        print(f"warning: {path} is from another machine ({changes}): sums may round differently")
    return state, [Epoch(**row) for row in json.loads(metadata["history"])]


def checksum_of(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over a checkpoint's tensors and metadata."""
    return digest({**metadata, "tensors": digest_of_tensors(state)})


class DiskTables:
    """A disk cache of members' logits, keyed by a digest of everything that decides them.

    A table is a memory-mapped .npy file, with a record beside it of what it was made from and its
    SHA-256; without a matching record, it is a cache miss.
    """

    cpu_seconds = 0.0
    """What this process spent on making tables; a cache hit costs nothing."""

    def table(
        self, record: Mapping[str, object], shape: tuple[int, ...], fill: Callable[[Tensor], None]
    ) -> Tensor:
        """The float16 table that `record` describes; on a cache miss, `fill` makes it."""
        import numpy as np

        whole = {**record, "code": code_digest(), "shape": list(shape)}
        path = TARGETS / f"{digest(whole)[:32]}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):  # students trained in parallel need the same
            if not is_of(path, whole):
                check_space(path.parent, 2 * math.prod(shape))
                with atomic(path) as temporary:
                    made = np.lib.format.open_memmap(temporary, "w+", np.float16, shape)
                    claim(temporary)
                    begun = time.process_time()
                    fill(torch.from_numpy(made))
                    DiskTables.cpu_seconds += time.process_time() - begun
                    made.flush()
                write_json(path.with_suffix(".json"), {**whole, "sha256": sha256(path)})
            for used in (path, path.with_suffix(".json")):
                os.utime(used)  # under noatime, housekeeping would think them unused
        # "c" (copy-on-write): nothing writes to it, but torch warns about read-only memory.
        return torch.from_numpy(np.load(path, mmap_mode="c"))


def claim(path: Path) -> None:
    """Allocate a sparse file's space now: later, a full disk would kill us with SIGBUS.

    Raises:
        OSError: the disk is full.
    """
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def remembered(
    topic: str, question: Mapping[str, Any], ask: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The result of a measurement on this machine, cached under .kd.

    Args:
        topic: What is measured; the cache's folder.
        question: Everything that the result depends on, as plain data.
        ask: Measures it; called on a cache miss.
    """
    path = MACHINE / topic / f"{digest(question)[:32]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            write_json(path, {**question, **ask()})
        return read_json(path)


def machine() -> dict[str, Any]:
    """The software and hardware that results on this machine depend on."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def processor() -> str:
    """The processor's name: on Linux from /proc, since Python rarely knows it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return found[0] if found else platform.processor() or platform.machine()


def is_of(table: Path, record: Mapping[str, object]) -> bool:
    """Whether a table exists, is intact, and was made from `record`."""
    try:
        found = read_json(table.with_suffix(".json"))
        return found == {**record, "sha256": sha256(table)}
    except (ArtifactError, FileNotFoundError):
        return False


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


def write_run_record(run_name: str, started: float, run_id: str | None, url: str | None) -> None:
    """Write down what differs between equal runs, and so stays out of artifacts: when and where.

    Args:
        run_name: The stage, and its name if it has one.
        started: Seconds since 1970.
        run_id: The tracking run's; None if there is none.
        url: That run's page.
    """
    commit, dirty = git.state(Path()) or (None, None)
    record = {
        "run_id": run_id,
        "url": url,
        "started": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
        "seconds": round(time.time() - started, 3),
        "commit": commit,
        "dirty": dirty,
        "host": platform.node(),
        "python": platform.python_version(),
        **machine(),
    }
    path = ROOT / "runs" / f"{run_name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
