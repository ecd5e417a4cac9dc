"""Verify exports: a file is published only if its outputs match the network's.

Shapes: N samples, B batch, C classes, H W image.
"""

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from kd.component import Refused
from kd.disk import digest, num_bytes, remove
from kd.exporters.files import torch_threads
from kd.exporters.format import Format
from kd.exporters.trained import Trained

BATCH = 256
AT = {
    "relative": "at most",
    "top1_agreement": "at least",
    "accuracy_points": "at most",
    "sqnr_db": "at least",
}
REMEDY = "if that is good enough, relax the export's `tolerance`"
CALIBRATE = "calibrate on more pictures (`int8: {calibration_images: ...}`)"


class ExportRefused(Refused):
    """The exported file's outputs do not match the network's; nothing was published."""


@dataclass(frozen=True)
class Parity:
    """An exported file compared with the eager network over all validation images."""

    file: str
    """The file's name in its folder."""
    kind: str
    precision: str
    picture_input: bool
    """Whether it takes uint8 NHWC pictures and returns probabilities, not images and logits."""
    size_bytes: int
    sha256: str
    """Of the file; for a folder (.mlpackage), of the list of its files' checksums."""
    num_images: int
    max_abs: float
    """Largest absolute difference of any output."""
    mean_abs: float
    """Mean absolute difference over all outputs."""
    sqnr_db: float | None
    """Power of the eager outputs over that of the differences; None if there are none."""
    eager_max_abs_logit: float
    """The largest absolute eager output: the scale to judge `max_abs` by."""
    top1_agreement: float
    val_accuracy: float
    eager_val_accuracy: float
    contents: dict[str, Any] = field(default_factory=dict)
    """What the format's `inspect` returned for the file."""

    @property
    def lost_points(self) -> float:
        """Validation accuracy lost, in percentage points."""
        return 100 * (self.eager_val_accuracy - self.val_accuracy)

    def record(self) -> dict[str, Any]:
        """The content of parity.json: the figures, then the contents, in one flat dict."""
        figures = asdict(self)
        contents = figures.pop("contents")
        return {**figures, **contents}


FineTune = Callable[[Parity], Trained | None]
"""Takes a file's figures; returns a network fine-tuned for the format, or None if not needed."""


def export_and_check(
    exporter: Format,
    trained: Trained,
    pictures_NHWC: Tensor,
    labels_N: Tensor,
    folder: Path,
    threads: int = 1,
    fine_tune: FineTune = lambda parity: None,
) -> Parity:
    """Export the network to `folder`/model`suffix` if the file is within tolerance.

    The file is written to a staging folder, loaded in its own runtime and compared on every
    image; only then is it moved into place.  A file left by an earlier export is always deleted.

    Args:
        exporter: The format.
        trained: The network; neither moved nor changed.
        pictures_NHWC: The validation split, uint8.  Each file makes one pass over it.
        labels_N: Its class indices.
        folder: Where the file goes; created if missing.
        threads: Threads for the eager network and the format's runtime.
        fine_tune: Called once, with the file's figures.  If it returns a network, that is exported
            too and compared with the original network, and the file with the higher validation
            accuracy is kept (the first if equal); the contents record `ptq_val_accuracy`,
            `qat_val_accuracy` and `chosen`.

    Raises:
        ExportRefused: the file is outside the exporter's tolerance.
        ConfigError: a package that the format needs is not installed, or the network cannot be
            exported.
        ValueError: there are more or fewer labels than pictures.
    """
    if len(labels_N) != len(pictures_NHWC):
        raise ValueError(f"{len(labels_N)} labels for {len(pictures_NHWC)} pictures")
    folder.mkdir(parents=True, exist_ok=True)
    published = folder / f"model{exporter.suffix}"
    remove(published)
    eager_NC = outputs(
        trained.served(exporter.picture_input), exporter, trained, pictures_NHWC, threads
    )
    with TemporaryDirectory(dir=folder, prefix=".export-") as staging:

        def made(network: Trained, name: str) -> tuple[Path, Parity]:
            path = Path(staging) / name / published.name
            path.parent.mkdir()
            exporter.export(network, path)
            exported_NC = outputs(
                exporter.load(path, threads), exporter, trained, pictures_NHWC, threads
            )
            return path, _compare(exporter, path, eager_NC, exported_NC, labels_N.cpu())

        path, parity = made(trained, "first")
        if tuned := fine_tune(parity):
            path, parity = _better((path, parity), made(tuned, "tuned"))
        _refuse_outside(exporter.tolerance.limits(exporter.precision), parity)
        os.replace(path, published)
    return parity


@torch.inference_mode()
def outputs(
    network: Callable[[Tensor], Tensor],
    exporter: Format,
    trained: Trained,
    pictures_NHWC: Tensor,
    threads: int,
) -> Tensor:
    """Outputs (N, C) of `network`, eager or a loaded file, for the pictures, in float64."""
    with torch_threads(threads):
        return torch.cat(
            [
                network(trained.inputs(pictures_BHWC.cpu(), exporter.picture_input))
                for pictures_BHWC in pictures_NHWC.split(BATCH)
            ]
        ).double()


def _compare(
    exporter: Format, path: Path, eager_NC: Tensor, exported_NC: Tensor, labels_N: Tensor
) -> Parity:
    difference_NC = (exported_NC - eager_NC).abs()
    eager_top1_N, top1_N = eager_NC.argmax(1), exported_NC.argmax(1)
    return Parity(
        file=path.name,
        kind=exporter.kind,
        precision=exporter.precision,
        picture_input=exporter.picture_input,
        size_bytes=num_bytes(path),
        sha256=digest(path),
        num_images=len(labels_N),
        max_abs=difference_NC.max().item(),
        mean_abs=difference_NC.mean().item(),
        sqnr_db=_decibels(eager_NC, difference_NC),
        eager_max_abs_logit=eager_NC.abs().max().item(),
        top1_agreement=_share(top1_N == eager_top1_N),
        val_accuracy=_share(top1_N == labels_N),
        eager_val_accuracy=_share(eager_top1_N == labels_N),
        contents=exporter.inspect(path),
    )


def _better(first: tuple[Path, Parity], tuned: tuple[Path, Parity]) -> tuple[Path, Parity]:
    """The file with the higher accuracy; both accuracies are added to its contents."""
    ptq, qat = first[1].val_accuracy, tuned[1].val_accuracy
    path, parity = tuned if qat > ptq else first
    parity.contents.update(
        chosen="qat" if qat > ptq else "ptq", ptq_val_accuracy=ptq, qat_val_accuracy=qat
    )
    return path, parity


def _share(holds_N: Tensor) -> float:
    return holds_N.double().mean().item()


def _decibels(signal_NC: Tensor, noise_NC: Tensor) -> float | None:
    """10 log10 of the ratio of powers; None if there is no noise."""
    ratio = (signal_NC.square().sum() / noise_NC.square().sum()).item()
    return None if ratio == math.inf else 10 * math.log10(ratio) if ratio else -math.inf


def _refuse_outside(limits: dict[str, float], parity: Parity) -> None:
    # Each test states what must hold: a NaN fails every comparison and so is refused.
    held: dict[str, Callable[[float], bool]] = {
        "relative": lambda most: parity.max_abs <= most * max(1.0, parity.eager_max_abs_logit),
        "top1_agreement": lambda least: parity.top1_agreement >= least,
        "accuracy_points": lambda most: parity.lost_points <= _points(most, parity) + 1e-9,
        "sqnr_db": lambda least: parity.sqnr_db is None or parity.sqnr_db >= least,
    }
    broken = [
        f"{name} may be {AT[name]} {limit:g}"
        for name, limit in limits.items()
        if not held[name](limit)
    ]
    if broken or not math.isfinite(parity.max_abs):
        sqnr = "infinite" if parity.sqnr_db is None else f"{parity.sqnr_db:.1f} dB"
        raise ExportRefused(
            f"{parity.file} ({parity.kind}, {parity.precision}) does not match the network "
            f"on {parity.num_images} validation images: outputs differ by up to "
            f"{parity.max_abs:.3g} (largest {parity.eager_max_abs_logit:.3g}, SQNR {sqnr}), "
            f"top-1 agreement is {parity.top1_agreement:.4f}, accuracy {parity.val_accuracy:.4f} "
            f"(eager {parity.eager_val_accuracy:.4f}); outside of tolerance: {', '.join(broken)} "
            f"(one picture is {100 / parity.num_images:.2f} points); nothing was published; "
            f"{_remedy(parity)}"
        )


def _remedy(parity: Parity) -> str:
    """What to try after a refusal; suggests fine-tuning if it has not been tried."""
    if parity.precision != "int8":
        return REMEDY
    found = parity.contents
    if "chosen" not in found:
        learn_on = "fine-tune the student in int8 (`int8: {qat_when_loss_above: 0.5}`)"
        return f"{CALIBRATE}, {learn_on}, or, {REMEDY}"
    return (
        f"accuracy is {found['ptq_val_accuracy']:.4f} with calibration alone, after fine-tuning "
        f"in int8 {found['qat_val_accuracy']:.4f}: fine-tune for longer or at another rate "
        f"(`int8: {{qat_epochs: ..., qat_lr: ...}}`), {CALIBRATE}, or, {REMEDY}"
    )


def _points(most: float, parity: Parity) -> float:
    """The points that may be lost: at least one picture's, unless none may be lost at all."""
    return max(most, 100 / parity.num_images) if most else 0.0
