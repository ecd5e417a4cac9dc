"""The bundle: an export's folder, with all that an app's developer needs beside the file.

    model.*             the exported file (a folder for Core ML)
    labels.txt          class names, one a line, in the order of the outputs
    preprocessing.json  from a picture's bytes to the file's input, and what its output means
    MODEL_CARD.md       what it is, how good, how to load it
    parity.json         how the file compares with the network on the validation images
    student.json        the network's manifest: teachers, weights, data, recipe
    classify.py         a reader of this folder that needs no `kd`
    SHA256SUMS          of all files above
    benchmark.json      latency and memory as measured here; the one file that differs from run
                        to run, and therefore is not in SHA256SUMS

SHA256SUMS goes first and comes last: a folder that lacks it, or differs from it, is no bundle.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kd import artifacts
from kd.artifacts import ArtifactError
from kd.bundle import checksums
from kd.bundle.card import card
from kd.bundle.form import labels, preprocessing
from kd.exporters.parity import digest
from kd.manifest import Manifest

__all__ = ["clear", "write"]

READER = Path(__file__).with_name("classify.py")
WRITTEN = (
    "labels.txt",
    "preprocessing.json",
    "MODEL_CARD.md",
    "parity.json",
    "student.json",
    READER.name,
    checksums.SUMS,
    checksums.BENCHMARK,
)
"""All that a bundle holds beside the exported file."""


def clear(folder: Path) -> None:
    """Make room for a new export: what an older one left, whole or half, is deleted.

    Raises:
        ArtifactError: the folder holds something that no export writes; nothing is deleted.
    """
    present = sorted(folder.iterdir(), key=lambda path: path.name != checksums.SUMS)
    for path in present:
        ours = path.name in WRITTEN or path.stem == "model" or checksums.passing(path.name)
        if not ours:
            raise ArtifactError(f"{path} is no part of an export: move it away")
    for path in present:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def write(
    folder: Path, parity: Mapping[str, Any], student: Manifest, data: Mapping[str, Any]
) -> None:
    """Put beside an exported file all that belongs to it.

    Args:
        folder: Holds the file, and benchmark.json if it was measured.
        parity: The record of its comparison with the network, `Parity.record()`.
        student: The manifest of the network that was exported.
        data: The record of the data that it learned from, data.json.

    Raises:
        Refused: labels and outputs do not fit each other.
        ArtifactError: the file is not the one that was compared.
    """
    path = folder / parity["file"]
    if not path.exists() or digest(path) != parity["sha256"]:
        raise ArtifactError(f"{path} is not the file that was compared: {artifacts.remedy(path)}")
    form = preprocessing(parity, student)
    contents = {
        "labels.txt": labels(student.class_names, form),
        "preprocessing.json": _json(form),
        "parity.json": _json(parity),
        "student.json": _json(asdict(student)),
        "MODEL_CARD.md": card(parity, student, data, form),
        READER.name: READER.read_text("utf-8"),
    }
    for name, text in contents.items():
        with artifacts.atomic(folder / name) as temporary:
            temporary.write_text(text, "utf-8")
    checksums.write(folder)


def _json(record: Mapping[str, Any]) -> str:
    return json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
