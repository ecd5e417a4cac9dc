"""MLflow's loader for the registered student: images in, logits out, no pickle.

`mlflow.pyfunc.load_model("models:/kd-student@champion").predict(images)` calls `_load_pyfunc`
with the logged folder.  The process needs torch, safetensors, numpy and this package.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

# N samples, H W image, C classes


class Student:
    """A trained network that takes images of its own size, not yet normalised."""

    def __init__(self, folder: Path) -> None:
        """Args: folder: Contains model.safetensors and manifest.json."""
        from kd import manifest

        self._model, self._manifest = manifest.load(folder)

    def get_raw_model(self) -> "nn.Module":
        """The network itself, which takes normalised images (N, channels, H, W).

        MLflow's `PyFuncModel.get_raw_model` calls it.
        """
        return self._model

    def predict(
        self, images: "NDArray[np.uint8]", params: dict[str, Any] | None = None
    ) -> "NDArray[np.float32]":
        """Logits (N, C) of uint8 images (N, H, W, channels), computed as in validation.

        Raises:
            ValueError: the images have another dtype or size.
        """
        import numpy as np
        import torch

        from kd.data import Images
        from kd.evaluate import predict

        pixels_NHWc = np.array(images)
        about = self._manifest
        wanted = (about.image_size, about.image_size, about.channels)
        if pixels_NHWc.dtype != np.uint8 or pixels_NHWc.shape[1:] != wanted:
            raise ValueError(
                f"images are {pixels_NHWc.dtype} {pixels_NHWc.shape}; "
                f"they must be uint8 ('N', {', '.join(map(str, wanted))})"
            )
        given = Images(
            pixels_NHWC=torch.from_numpy(pixels_NHWc),
            labels_N=torch.full((len(pixels_NHWc),), -1),
            mean=about.mean,
            std=about.std,
        )
        logits_NC: NDArray[np.float32] = predict(self._model, given).numpy()
        return logits_NC


def _load_pyfunc(path: str) -> Student:
    """Called by MLflow."""
    return Student(Path(path))
