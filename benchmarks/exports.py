"""Every format and precision of the same networks: size, time beside eager, agreement, accuracy.

    OMP_NUM_THREADS=1 python benchmarks/exports.py [--epochs 20] [--seconds 2] [--skip-224]

The plain CNN and ResNet-8/20 are trained on digits from labels; MobileNetV3-small and ShuffleNetV2
x0.5 have random weights at 224 pixels, so that time and size of them mean something, and accuracy
nothing (random networks have no margins: their int8 agreement is low whatever the format does).
Core ML is evaluated by the reference interpreter, and has no time.  One thread, one picture a
call; eager and file are measured in turns.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kd.data import Augment, Digits, Images, Splits, prepare
from kd.exporters import (
    CoreML,
    ExecuTorch,
    Onnx,
    Parity,
    Tolerance,
    Trained,
    export_and_check,
    latency,
)
from kd.models import CifarResNet, Model, PlainCNN, build_model
from kd.recipe import SGD, Recipe
from kd.train import fit

ANYTHING = Tolerance(relative=1e9, top1_agreement=0.0, accuracy_points=100.0, sqnr_db=-1e9)
FORMATS: list[Any] = [
    ExecuTorch(tolerance=ANYTHING),
    ExecuTorch(precision="int8", tolerance=ANYTHING),
    Onnx(tolerance=ANYTHING),
    Onnx(precision="int8", tolerance=ANYTHING),
    Onnx(precision="int8", reduce_range=False, tolerance=ANYTHING),
    CoreML(tolerance=ANYTHING),
    CoreML(precision="int8", tolerance=ANYTHING),
]
HEAD = "| network | format | bytes | ms (p90) | eager ms | agreement | accuracy (eager) | dB |"


def main() -> None:
    """Print the table."""
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--epochs", type=int, default=20)
    given.add_argument("--seconds", type=float, default=2.0)
    given.add_argument("--skip-224", action="store_true")
    asked = given.parse_args()
    torch.set_num_threads(1)
    print(HEAD, "| --- " * HEAD.count(" |") + "|", sep="\n")
    with tempfile.TemporaryDirectory() as folder:
        for name, trained, val in networks(Path(folder), asked.epochs, not asked.skip_224):
            for exporter in FORMATS:
                parity = export_and_check(
                    exporter, trained, val.pixels_NHWC, val.labels_N, Path(folder) / "out"
                )
                path = Path(folder) / "out" / parity.file
                print(row(name, exporter, trained, parity, path, asked.seconds), flush=True)


def networks(folder: Path, epochs: int, large: bool) -> Iterator[tuple[str, Trained, Images]]:
    """Each network with the images that judge it."""
    splits = Splits(val=0.2, test=0.2)
    record = prepare(Digits(), splits, image_size=16, channels=1, seed=0, folder=folder)
    train = Images.load(folder, "train", augment=Augment(shift=1))
    val = Images.load(folder, "val")
    about: dict[str, Any] = {
        "class_names": tuple(record["class_names"]),
        "mean": train.mean,
        "std": train.std,
    }
    recipe = Recipe(epochs=epochs, optimizer=SGD(lr=0.05))
    models: dict[str, Model] = {
        "plain CNN": PlainCNN(depth=2),
        "ResNet-8": CifarResNet(depth=8),
        "ResNet-20": CifarResNet(depth=20),
    }
    for name, model in models.items():
        torch.manual_seed(0)
        module = build_model(model, channels=1, image_size=16, num_classes=10)
        module, _ = fit(module, train, recipe, seed=0, num_classes=10)
        pictures = train.pixels_NHWC
        yield name, Trained(module=module, image_size=16, calibration_NHWC=pictures, **about), val
    for name in ("mobilenet_v3_small", "shufflenet_v2_x0_5") if large else ():
        yield name, *at_224(name)


def at_224(name: str) -> tuple[Trained, Images]:
    """A torchvision network of random weights, its batch norms settled on random pictures."""
    import torchvision

    torch.manual_seed(0)
    module = torchvision.models.get_model(name, num_classes=10)
    pictures = torch.randint(0, 256, (16, 224, 224, 3), dtype=torch.uint8)
    trained = Trained(
        module=module,
        image_size=224,
        class_names=tuple("0123456789"),
        mean=(0.5,) * 3,
        std=(0.29,) * 3,
        calibration_NHWC=pictures,
    )
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None
    with torch.no_grad():
        images_NCHW = trained.normalise(pictures)
        module.train()(images_NCHW)
        labels_N = module.eval()(images_NCHW).argmax(1)
    return trained, Images(
        pixels_NHWC=pictures, labels_N=labels_N, mean=trained.mean, std=trained.std
    )


def row(
    name: str, exporter: Any, trained: Trained, parity: Parity, path: Path, seconds: float
) -> str:
    """One line of the table."""
    form = f"{exporter.kind} {exporter.precision}"
    if not getattr(exporter, "reduce_range", True):
        form += ", 8-bit weights"
    time = eager = "-"
    if exporter.runs_here:
        image = trained.example(picture_input=False)
        found = latency({"eager": trained.module, "file": exporter.load(path)}, image, 1, seconds)
        time = f"{found['file']['median_ms']:.3f} ({found['file']['p90_ms']:.3f})"
        eager = f"{found['eager']['median_ms']:.3f}"
    cells = (
        name,
        form,
        f"{parity.size_bytes:,}",
        time,
        eager,
        f"{parity.top1_agreement:.4f}",
        f"{parity.val_accuracy:.4f} ({parity.eager_val_accuracy:.4f})",
        "-" if parity.sqnr_db is None else f"{parity.sqnr_db:.1f}",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
