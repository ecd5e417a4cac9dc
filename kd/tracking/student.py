"""The student as MLflow's registry serves it: images in, logits out, no pickle.

`mlflow.pyfunc.load_model("models:/kd-student@champion").predict(images)` calls `_load_pyfunc`
with the folder that was logged.  The process needs torch, safetensors, numpy and this package.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# N samples, H W image, C classes


class Student:
    """A trained network that takes images as they come out of a file."""

    def __init__(self, folder: Path) -> None:
        """Args: folder: Holds model.safetensors and manifest.json."""
        from kd import manifest

        self._model, self._manifest = manifest.load(folder)

    def predict(
        self, images: "NDArray[np.uint8]", params: dict[str, Any] | None = None
    ) -> "NDArray[np.float32]":
        """Logits (N, C) of uint8 images (N, H, W, channels)."""
        import numpy as np
        import torch

        images_NHWc = torch.from_numpy(np.array(images)).float() / 255
        mean, std = (torch.tensor(v) for v in (self._manifest.mean, self._manifest.std))
        with torch.inference_mode():
            logits_NC = self._model(((images_NHWc - mean) / std).permute(0, 3, 1, 2).contiguous())
        logits: NDArray[np.float32] = logits_NC.numpy()
        return logits


def _load_pyfunc(path: str) -> Student:
    """What MLflow calls."""
    return Student(Path(path))
