"""A trained model's folder: its weights, and the manifest that says where they come from."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from kd import artifacts
from kd.artifacts import ArtifactError
from kd.models import Model, build_model

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A trained network that taught another: its run name and the SHA-256 of its weights."""

    name: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What is needed to use a trained network, and what it was made from."""

    format: int = FORMAT
    name: str
    """Run name: teacher, assistants/large, student, baselines/uniform."""
    role: str
    """teacher, assistant or student."""
    model: dict[str, Any]
    """The model's component, as plain data."""
    channels: int
    image_size: int
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    """Per channel, for pixels in [0, 1]: subtracted from an image before the network sees it."""
    std: tuple[float, ...]
    """Per channel, for pixels in [0, 1]: divides what remains."""
    data_hash: str
    teachers: tuple[Origin, ...]
    """Its teachers, in the order of `weights_K`; empty if it learned from labels alone."""
    weights_K: tuple[float, ...]
    """Each teacher's weight."""
    mixing: str
    """What the weights averaged: probabilities or logits."""
    method: dict[str, Any] | None
    """How it learned, as plain data; None if from labels alone."""
    peers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The models of the networks trained along with it, as plain data."""
    generations: int = 1
    """How often it was trained, each time after the first taught only by the one before."""
    recipe: dict[str, Any]
    seed: int
    sha256: str = ""
    """Of model.safetensors."""
    code: str
    """SHA-256 over the sources that decided what it learned."""
    torch: str = torch.__version__
    device: str

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.class_names)

    def build(self, model: dict[str, Any] | None = None) -> nn.Module:
        """The network, untrained; or another model, such as a peer's, for the same images.

        Raises:
            ArtifactError: another version of the code wrote it, and this one lacks that model.
            ConfigError: it cannot be built, or does not turn such images into logits.
        """
        plain = self.model if model is None else model
        fields = _frozen(plain)
        kinds = {cls.kind: cls for cls in get_args(Model)}
        try:
            described = kinds[fields["kind"]](**fields)
        except (KeyError, TypeError) as error:
            raise ArtifactError(
                f"{self.name} has the model {plain}, which this code does not know ({error!r}): "
                "train it again"
            ) from None
        return build_model(
            described,
            channels=self.channels,
            image_size=self.image_size,
            num_classes=self.num_classes,
        )


def save(folder: Path, module: nn.Module, manifest: Manifest) -> Manifest:
    """Write a trained network and its manifest; return the latter with the weights' SHA-256."""
    digest = artifacts.save_model(folder / "model.safetensors", module)
    manifest = replace(manifest, sha256=digest)
    artifacts.write_json(folder / "manifest.json", asdict(manifest))
    return manifest


def load(folder: Path) -> tuple[nn.Module, Manifest]:
    """A trained network in eval mode on the CPU, and its manifest.

    Raises:
        ArtifactError: a file is missing or damaged, the weights do not match the manifest, or
            this code does not know the model.
    """
    manifest = read(folder)
    weights = folder / "model.safetensors"
    if not weights.exists() or artifacts.sha256(weights) != manifest.sha256:
        raise ArtifactError(
            f"{weights} is not the file that {folder / 'manifest.json'} describes: "
            f"{artifacts.remedy(weights)}"
        )
    return artifacts.load_model(weights, manifest.build()), manifest


def read(folder: Path, name: str = "manifest.json") -> Manifest:
    """The manifest in a trained network's folder, or the copy in a bundle's.

    Raises:
        ArtifactError: it is missing, damaged or of another format.
    """
    path = folder / name
    record = artifacts.read_json(path)
    if record.get("format") != FORMAT:
        raise ArtifactError(
            f"{path} has format {record.get('format')!r}, this version reads {FORMAT}: "
            f"{artifacts.remedy(path)}"
        )
    try:
        teachers = tuple(Origin(**teacher) for teacher in record["teachers"])
        return Manifest(**{**_frozen(record), "teachers": teachers})
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} is damaged ({error!r}): {artifacts.remedy(path)}") from None


def _frozen(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with JSON's lists turned into tuples."""
    return {key: tuple(v) if isinstance(v, list) else v for key, v in record.items()}


def check_lineage(members: Iterable[Manifest], present: Mapping[str, str], data_hash: str) -> None:
    """Refuse members that learned from other data or other teachers than those now here.

    Args:
        members: The networks about to teach.
        present: SHA-256 of the weights that each run name now has.
        data_hash: Of the data about to be learned from.

    Raises:
        ArtifactError: names the member and the stage to run.
    """
    for member in members:
        if member.data_hash != data_hash:
            raise ArtifactError(f"{member.name} was trained on other data: {_again(member)}")
        for teacher in member.teachers:
            if present.get(teacher.name, teacher.sha256) != teacher.sha256:
                raise ArtifactError(
                    f"{member.name} was taught by another {teacher.name} than the one now here: "
                    f"{_again(member)}"
                )


def _again(member: Manifest) -> str:
    return f"run `dvc repro {member.name.replace('/', '@')}`"
