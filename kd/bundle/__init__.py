"""The bundle: an exported file's folder, with everything an app developer needs besides the file.

    model.*             the exported file (a folder for Core ML)
    labels.txt          class names, one per line, in the order of the outputs
    preprocessing.json  how to turn a picture into the file's input, and what its output means
    MODEL_CARD.md       what the model is, how accurate, how to load it
    parity.json         how the file compares with the network on the validation images
    student.json        the network's manifest: teachers, weights, data, recipe
    classify.py         loads and runs this folder's file without `kd`
    SHA256SUMS          checksums of all files above
    benchmark.json      latency and memory as measured here; not in SHA256SUMS, as it is the only
                        file that differs from run to run

SHA256SUMS is deleted first and written last: a folder without it, or with other files, is not a
valid bundle.
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
from kd.disk import digest
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
"""All files of a bundle besides the exported one."""


def clear(folder: Path) -> None:
    """Delete an older export's files, complete or not, before a new export.

    Raises:
        ArtifactError: the folder has a file that no export writes; nothing is deleted.
    """
    present = sorted(folder.iterdir(), key=lambda path: path.name != checksums.SUMS)
    for path in present:
        ours = path.name in WRITTEN or path.stem == "model" or checksums.passing(path.name)
        if not ours:
            raise ArtifactError(f"{path} is not part of an export: move it away")
    for path in present:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def write(
    folder: Path, parity: Mapping[str, Any], student: Manifest, data: Mapping[str, Any]
) -> None:
    """Write the bundle's other files next to an exported file.

    Args:
        folder: Contains the file, and benchmark.json if it was measured.
        parity: The record of its comparison with the network, `Parity.record()`.
        student: The manifest of the network that was exported.
        data: The record of its training data, data.json.

    Raises:
        Refused: the class names do not fit the outputs, or are not one line each.
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
