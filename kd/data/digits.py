"""Handwritten digits that are part of scikit-learn: real images without a download."""

from typing import Literal

from kd.component import component
from kd.data.raw import Raw


@component
class Digits:
    """1,797 grey 8 x 8 images of the digits 0 to 9 (UCI Optical Recognition, test part)."""

    kind: Literal["digits"] = "digits"

    def read(self) -> Raw:
        """Read the images, scaling their 17 grey levels 0..16 to 0..255."""
        import numpy as np
        from sklearn.datasets import load_digits

        source = load_digits()
        return Raw(
            images=np.rint(source.images * (255 / 16)).astype(np.uint8),
            labels_N=source.target.astype(np.int64),
            class_names=tuple(str(digit) for digit in source.target_names),
        )
