"""A small student, exported and bundled.

Shapes: N pictures, C classes.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kd import bundle, manifest
from kd.exporters import Trained, export_and_check
from kd.manifest import Manifest, Origin
from kd.models import PlainCNN, build_model
from tests.checks_exporters import need

CLASSES = ("cat", "Katze, groß", "猫")
DATA = {
    "dataset": {"kind": "toys"},
    "data_hash": "d" * 64,
    "class_names": list(CLASSES),
    "splits": {"train": {"count": 12}, "val": {"count": 40}},
}


@dataclass(frozen=True)
class Bundled:
    folder: Path
    images_NHWC: NDArray[np.uint8]
    """The validation pictures, as they come out of a file."""
    labels_N: NDArray[np.int64]
    logits_NC: NDArray[np.float32]
    """By the network itself."""
    parity: dict[str, Any]
    student: Manifest


def network(folder: Path, seed: int = 0, **others: Any) -> tuple[torch.nn.Module, Manifest]:
    """A network of random weights whose classes differ, saved as its stage does.

    Args:
        folder: Where it is kept.
        seed: Decides its weights.
        others: Fields of the manifest, if not the student's.
    """
    torch.manual_seed(seed)
    module = build_model(PlainCNN(depth=2), channels=3, image_size=8, num_classes=3).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(3)  # so that the classes' logits lie apart
    fields = {
        "name": "student", "role": "student", "model": {"kind": "plain_cnn", "depth": 2},
        "channels": 3, "image_size": 8, "class_names": CLASSES, "mean": (0.5, 0.4, 0.3),
        "std": (0.25, 0.2, 0.3), "data_hash": "d" * 64,
        "teachers": (Origin(name="assistants/a", sha256="a" * 64),
                     Origin(name="assistants/b", sha256="b" * 64)),
        "weights_K": (0.75, 0.25), "mixing": "probabilities", "method": {"kind": "kd"},
        "recipe": {"epochs": 1}, "seed": seed, "code": "c" * 64, "device": "cpu",
    } | others  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    return module, manifest.save(folder, module, Manifest(**fields))


def bundled(folder: Path, exporter: Any, name: str = "", seed: int = 0, **others: Any) -> Bundled:
    """Export a student and write its bundle, as the exports stage does."""
    need(exporter)
    module, described = network(folder / "student", seed, **others)
    images_NHWC = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    mean, std = torch.tensor(described.mean), torch.tensor(described.std)
    given = ((torch.from_numpy(images_NHWC).float() / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        logits_NC = module(given)
    labels_N = logits_NC.argmax(1)
    labels_N[::4] = (labels_N[::4] + 1) % 3  # so that it errs now and then
    out = folder / "exports" / (name or exporter.kind)
    out.mkdir(parents=True)
    pictures_NHWC = torch.from_numpy(images_NHWC)
    trained = Trained(
        module=module, image_size=8, class_names=CLASSES, mean=described.mean, std=described.std,
        calibration_NHWC=pictures_NHWC,
    )  # fmt: skip
    parity = export_and_check(exporter, trained, pictures_NHWC, labels_N, out).record()
    bundle.write(out, parity, described, DATA)
    return Bundled(out, images_NHWC, labels_N.numpy(), logits_NC.numpy(), parity, described)


OUTSIDER = """
import json, re, sys
class Gate:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in sys.argv[2].split(","):
            raise ImportError("an outsider has no " + name)
sys.meta_path.insert(0, Gate())
folder = sys.argv[1]
sys.path.insert(0, folder)
import numpy as np
images = np.load(sys.argv[3])
python = re.search(r"```python\\n(.*?)```", open(folder + "/MODEL_CARD.md").read(), re.S)[1]
exec(python)
labels = open(folder + "/labels.txt", encoding="utf-8").read().splitlines()
print(json.dumps({"index": [labels.index(name) for name in found["label"]],
                  "probabilities": found["probabilities"].tolist()}))
"""
"""Runs the card's own Python lines, in the bundle's folder."""


def outsider(folder: Path, images_path: Path, absent: str) -> dict[str, Any]:
    """What somebody without this package, and without `absent`, gets by the card's lines."""
    done = subprocess.run(
        [sys.executable, "-c", OUTSIDER, str(folder), absent, str(images_path)],
        cwd=folder, env={"PATH": ""}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
