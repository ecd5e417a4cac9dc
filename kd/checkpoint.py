"""fit()'s checkpoints on disk: checksummed, and never without a good one."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from kd.artifacts import ArtifactError, digest, read_tensors, state_path, write_tensors
from kd.ensemble import digest_of_tensors
from kd.machine import machine
from kd.train import Epoch


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
