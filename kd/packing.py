"""What an exporter is given: the trained student and calibration images; and a trial run of it.

N images, H W image, channels last.
"""

import torch
from torch import Tensor

from kd import artifacts, manifest
from kd.data import Images
from kd.exporters import Exporter, Int8, Trained
from kd.exporters.files import captured, for_export
from kd.exporters.trained import evenly
from kd.manifest import Manifest
from kd.models import Model, build_model


def student_to_export(exporter: Exporter) -> tuple[Trained, Manifest]:
    """The trained student with what an export needs, and its manifest."""
    module, described = manifest.load(artifacts.folder("student"))
    trained = Trained(
        module=module,
        image_size=described.image_size,
        class_names=described.class_names,
        mean=described.mean,
        std=described.std,
        calibration_NHWC=calibration(exporter.int8),
        metadata={"student": described.sha256, "data": described.data_hash},
    )
    return trained, described


def calibration(int8: Int8 | None) -> Tensor | None:
    """Training images to calibrate int8, spread evenly over train and pool; None without int8."""
    if int8 is None:
        return None
    num = int8.calibration_images
    splits = [Images.load(artifacts.DATA, split).pixels_NHWC for split in ("train", "pool")]
    total = sum(map(len, splits))
    return torch.cat(
        [
            pixels_NHWC[evenly(len(pixels_NHWC), -(-num * len(pixels_NHWC) // total))]
            for pixels_NHWC in splits
            if len(pixels_NHWC)
        ]
    )


def try_export(model: Model, *, channels: int, image_size: int, num_classes: int) -> None:
    """Trace the untrained student, to find out before training if no format can take it.

    Raises:
        ConfigError: it cannot be traced (say, if it branches on pixels).
    """
    shape = {"channels": channels, "image_size": image_size, "num_classes": num_classes}
    module = build_model(model, **shape)
    captured(for_export(module), torch.zeros(1, channels, image_size, image_size))
