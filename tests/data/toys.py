"""Small data sets for tests, written the way a user writes one of their own."""

from pathlib import Path

import numpy as np
from PIL import Image

from kd.data import Raw


class Stripes:
    """Two grey classes, horizontal and vertical stripes; a tenth may have no label."""

    def __init__(self, num: int = 60, unlabelled: bool = False) -> None:
        self.num, self.unlabelled = num, unlabelled

    def read(self) -> Raw:
        rng = np.random.default_rng(0)
        images = rng.integers(0, 60, (self.num, 9, 7), dtype=np.uint8)
        images[::2, ::2] += 150
        images[1::2, :, ::2] += 150
        labels_N = np.arange(self.num) % 2
        if self.unlabelled:
            labels_N[::10] = -1
        return Raw(images=images, labels_N=labels_N, class_names=("horizontal", "vertical"))


class WithTest(Stripes):
    """The same with a test split of its own: the last third."""

    def read(self) -> Raw:
        raw = super().read()
        return Raw(
            images=raw.images,
            labels_N=raw.labels_N,
            class_names=raw.class_names,
            is_test_N=np.arange(self.num) >= self.num * 2 // 3,
        )


class Unreadable:
    """Has no read()."""


class Wrong:
    """Reads something else than a Raw."""

    def read(self) -> int:
        return 3


class Failing:
    """Raises while it reads."""

    def read(self) -> None:
        raise OSError("disk on fire")


def make_pictures(root: Path, counts: dict[str, int]) -> Path:
    """Pictures of several sizes, modes and types in one folder for each class."""
    rng = np.random.default_rng(1)
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            mode, channels = (("L", 0), ("RGB", 3), ("RGBA", 4))[i % 3]
            shape = (10 + i, 14, channels) if channels else (10 + i, 14)
            picture = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
            assert picture.mode == mode
            picture.save(root / name / f"{i}.{'png' if channels == 4 else 'jpg'}")
    return root
