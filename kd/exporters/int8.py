"""Int8: what it takes to bring a network to 8-bit integers, in whatever format."""

from kd.component import component, require


@component
class Int8:
    """Calibration, and fine-tuning where calibration alone costs too much."""

    calibration_images: int = 256
    """Training pictures (labelled and pool) that ranges are taken from, at least 1; all if there
    are fewer."""
    qat_when_loss_above: float | None = None
    """Points of validation accuracy; where calibration loses more, the student is fine-tuned with
    simulated int8 under the same teachers, and the better file is kept.  null: never."""
    qat_epochs: int = 3
    """Passes over the training data in that case, at least 1."""
    qat_lr: float = 0.01
    """Learning rate then, as a share of the student's recipe's; above 0."""

    def __post_init__(self) -> None:
        images, above = self.calibration_images, self.qat_when_loss_above
        require(images >= 1, "calibration_images", images, "at least 1")
        require(above is None or above >= 0, "qat_when_loss_above", above, "0 or more, or null")
        require(self.qat_epochs >= 1, "qat_epochs", self.qat_epochs, "at least 1")
        require(self.qat_lr > 0, "qat_lr", self.qat_lr, "above 0")
