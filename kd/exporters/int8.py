"""Int8: settings for quantising a network to 8-bit integers, the same for every format."""

from kd.component import component, require


@component
class Int8:
    """Calibration, and quantisation-aware training if calibration loses too much accuracy."""

    calibration_images: int = 256
    """Training pictures (labelled and pool) used to find activation ranges, at least 1; all if
    there are fewer."""
    qat_when_loss_above: float | None = None
    """Points of validation accuracy; if calibration loses more, the student is fine-tuned with
    simulated int8 under the same teachers, and the better file is kept.  null: never."""
    qat_epochs: int = 3
    """Epochs of this fine-tuning, at least 1."""
    qat_lr: float = 0.01
    """Its learning rate, as a fraction of the student recipe's; above 0."""

    def __post_init__(self) -> None:
        images, above = self.calibration_images, self.qat_when_loss_above
        require(images >= 1, "calibration_images", images, "at least 1")
        require(above is None or above >= 0, "qat_when_loss_above", above, "0 or more, or null")
        require(self.qat_epochs >= 1, "qat_epochs", self.qat_epochs, "at least 1")
        require(self.qat_lr > 0, "qat_lr", self.qat_lr, "above 0")
