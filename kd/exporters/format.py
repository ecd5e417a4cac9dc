"""What a format promises: the interface of exporters, and how far a file may be off.

docs/exports.md says how to add one.
"""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Protocol

from kd.component import component, require
from kd.exporters.files import Runner
from kd.exporters.int8 import Int8
from kd.exporters.trained import Trained

HELD_TO: dict[str, dict[str, float]] = {
    "fp32": {"relative": 1e-4, "top1_agreement": 0.999, "accuracy_points": 0.1},
    "fp16": {"relative": 2e-2, "top1_agreement": 0.99, "accuracy_points": 0.5, "sqnr_db": 30.0},
    "int8": {"top1_agreement": 0.95, "accuracy_points": 1.0, "sqnr_db": 10.0},
}
"""Default limits for each precision, where a `Tolerance` does not override them.

fp32 files of CNNs have differed by 1e-7 to 1.4e-5.  Logits of int8 files differ by whole units
while the classes agree, so int8 has no limit on the largest difference."""


@component
class Tolerance:
    """How far an exported file may be from the eager network on the validation images.

    A field that is None takes the default for the file's precision, in HELD_TO.
    """

    relative: float | None = None
    """Largest difference of any output, relative to the largest eager output (to 1, if that is
    smaller); at least 0."""
    top1_agreement: float | None = None
    """Smallest fraction of images with the same predicted class, in [0, 1]."""
    accuracy_points: float | None = None
    """Largest loss of validation accuracy, in percentage points; at least 0.  Any value above 0
    allows at least one picture, however few there are."""
    sqnr_db: float | None = None
    """Smallest ratio of the outputs' power to that of their differences, in decibels."""

    def __post_init__(self) -> None:
        for name in ("relative", "accuracy_points"):
            value = getattr(self, name)
            require(value is None or value >= 0, name, value, "0 or more")
        agreement = self.top1_agreement
        inside = agreement is None or 0 <= agreement <= 1
        require(inside, "top1_agreement", agreement, "in [0, 1]")
        sqnr = self.sqnr_db
        require(sqnr is None or not math.isnan(sqnr), "sqnr_db", sqnr, "a number of decibels")

    def limits(self, precision: str) -> dict[str, float]:
        """The limits for a file of this precision, by field; a missing field has no limit."""
        own = {name: value for name, value in asdict(self).items() if value is not None}
        return HELD_TO[precision] | own


class Format(Protocol):
    """The interface of the union `Exporter`'s members."""

    suffix: ClassVar[str]
    runs_here: ClassVar[bool]
    """Whether `load` uses the format's own runtime, so that its latency is worth measuring."""

    @property
    def kind(self) -> str: ...  # noqa: D102
    @property
    def precision(self) -> str:
        """One of HELD_TO's keys."""
        ...

    @property
    def picture_input(self) -> bool:
        """Whether files take pictures (uint8, NHWC) and return probabilities."""
        ...

    @property
    def int8(self) -> Int8 | None:
        """How int8 files are calibrated; None if the format needs no calibration."""
        ...

    @property
    def tolerance(self) -> Tolerance:
        """How far outputs may differ from the eager network's before a file is refused."""
        ...

    def check(self) -> None:
        """Raise a ConfigError, before anything is trained, if exporting is bound to fail."""
        ...

    def export(self, trained: Trained, path: Path) -> None:
        """Write the network to the file `path`, completely or not at all."""
        ...

    def load(self, path: Path, threads: int = 1) -> Runner:
        """Load the file in the format's own runtime, or in a stand-in if it cannot run here."""
        ...

    def inspect(self, path: Path) -> dict[str, Any]:
        """Describe the file, for the record."""
        ...
