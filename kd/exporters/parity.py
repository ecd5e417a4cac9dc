"""Verified or refused: a file counts only if it computes what the network computes.

Shapes: N samples, B batch, C classes, H W image.
"""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from kd.component import Refused, component, require
from kd.exporters.files import Runner, for_export, torch_threads


class ExportRefused(Refused):
    """The exported file does not compute what the network computes; nothing was published."""


@component
class Tolerance:
    """How far an exported file may be from eager on the validation images."""

    relative: float = 1e-4
    """Largest difference of any logit, as a share of the largest eager logit (of 1, if that is
    smaller).  fp32 files of CNNs were seen to differ by 1e-7 to 1.4e-5."""
    top1_agreement: float = 0.999
    """Smallest share of images with the same predicted class, in [0, 1]."""

    def __post_init__(self) -> None:
        require(self.relative >= 0, "relative", self.relative, "0 or more")
        agreement = self.top1_agreement
        require(0 <= agreement <= 1, "top1_agreement", agreement, "in [0, 1]")


@dataclass(frozen=True)
class Parity:
    """An exported file beside the eager network, over all validation images."""

    file: str
    """The file's name in its folder."""
    size_bytes: int
    sha256: str
    num_images: int
    max_abs: float
    """Largest difference of any logit."""
    mean_abs: float
    """Mean difference of all logits."""
    eager_max_abs_logit: float
    """The scale that `max_abs` is to be seen on."""
    top1_agreement: float
    val_accuracy: float
    eager_val_accuracy: float
    contents: dict[str, Any] = field(default_factory=dict)
    """The format's own view of the file: its `inspect`."""

    def record(self) -> dict[str, Any]:
        """What parity.json holds: the figures, then the contents, in one flat table."""
        figures = asdict(self)
        contents = figures.pop("contents")
        return {**figures, **contents}


class Format(Protocol):
    """What a member of the union `Exporter` offers; docs/exports.md says how to add one."""

    suffix: ClassVar[str]

    @property
    def tolerance(self) -> Tolerance:
        """How far from eager a file may be and still be published."""
        ...

    def export(self, module: nn.Module, example_BCHW: Tensor, path: Path) -> None:
        """Write `module` to the file `path`, whole or not at all."""
        ...

    def load(self, path: Path, threads: int = 1) -> Runner:
        """The file in the format's own runtime."""
        ...

    def inspect(self, path: Path) -> dict[str, Any]:
        """What is in the file, for the record."""
        ...


def export_and_check(
    exporter: Format,
    module: nn.Module,
    example_BCHW: Tensor,
    batches: Iterable[Tensor],
    labels_N: Tensor,
    folder: Path,
    threads: int = 1,
) -> Parity:
    """Export `module` to `folder`/model`suffix`, if the file agrees with it on every image.

    The file is made beside its place, loaded in its own runtime and compared; only then is it
    moved there.  Whatever stood there before is gone in any case: it is not this network.

    Args:
        exporter: The format.
        module: The trained network; neither moved nor changed.
        example_BCHW: Images that the format may look at to build the file.
        batches: Validation images, (B, channels, H, W) float32 as the network takes them, in the
            order of the labels.  One pass over them is made.
        labels_N: Their class indices.
        folder: Where the file goes; made if missing.
        threads: Threads of eager and of the format's runtime.

    Raises:
        ExportRefused: the file is outside of the exporter's tolerance.
        ConfigError: a package that the format needs is not installed.
        ValueError: there are more or fewer labels than images.
    """
    folder.mkdir(parents=True, exist_ok=True)
    published = folder / f"model{exporter.suffix}"
    published.unlink(missing_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".export-") as staging:
        staged = Path(staging) / published.name
        exporter.export(module, example_BCHW, staged)
        parity = _compare(exporter, module, batches, labels_N, staged, threads)
        _refuse_outside(exporter.tolerance, parity)
        os.replace(staged, published)
    return parity


@torch.inference_mode()
def _compare(
    exporter: Format,
    module: nn.Module,
    batches: Iterable[Tensor],
    labels_N: Tensor,
    path: Path,
    threads: int,
) -> Parity:
    eager, runner = for_export(module), exporter.load(path, threads)
    with torch_threads(threads):
        pairs = [(eager(images), runner(images)) for images in (b.cpu() for b in batches)]
    eager_NC, exported_NC = (torch.cat(side).double() for side in zip(*pairs, strict=True))
    if len(labels_N) != len(eager_NC):
        raise ValueError(f"{len(labels_N)} labels for {len(eager_NC)} images")
    difference_NC = (exported_NC - eager_NC).abs()
    eager_top1_N, top1_N, labels_N = eager_NC.argmax(1), exported_NC.argmax(1), labels_N.cpu()
    data = path.read_bytes()
    return Parity(
        file=path.name,
        size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        num_images=len(labels_N),
        max_abs=difference_NC.max().item(),
        mean_abs=difference_NC.mean().item(),
        eager_max_abs_logit=eager_NC.abs().max().item(),
        top1_agreement=_share(top1_N == eager_top1_N),
        val_accuracy=_share(top1_N == labels_N),
        eager_val_accuracy=_share(eager_top1_N == labels_N),
        contents=exporter.inspect(path),
    )


def _share(holds_N: Tensor) -> float:
    return holds_N.double().mean().item()


def _refuse_outside(tolerance: Tolerance, parity: Parity) -> None:
    allowed = tolerance.relative * max(1.0, parity.eager_max_abs_logit)
    # Written so that a nan, which fails every comparison, is refused.
    if parity.max_abs <= allowed and parity.top1_agreement >= tolerance.top1_agreement:
        return
    raise ExportRefused(
        f"{parity.file} is not what the network computes on {parity.num_images} validation "
        f"images: logits differ by up to {parity.max_abs:.3g} ({allowed:.3g} allowed), top-1 "
        f"agreement is {parity.top1_agreement:.4f} ({tolerance.top1_agreement} needed), accuracy "
        f"{parity.val_accuracy:.4f} (eager {parity.eager_val_accuracy:.4f}); nothing was published"
    )
