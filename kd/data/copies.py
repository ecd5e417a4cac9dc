"""Find the images that are tested on and learned, too, pixel for pixel."""

import hashlib
from collections.abc import Iterator
from pathlib import Path


def copies(folder: Path) -> dict[str, list[tuple[int, int]]]:
    """The images of val and test that are in train or pool, too.

    Args:
        folder: what `prepare` wrote.

    Returns:
        For val and test, positions in the source: of the image, and of one that it equals.
    """
    learned = {
        digest: row for name in ("train", "pool") for row, digest in _digests(folder / name)
    }
    return {
        name: [
            (row, learned[digest]) for row, digest in _digests(folder / name) if digest in learned
        ]
        for name in ("val", "test")
    }


def _digests(folder: Path) -> Iterator[tuple[int, bytes]]:
    """Position in the source and hash of the pixels of each image of a split."""
    import numpy as np

    indices_N = np.load(folder / "indices.npy")
    images_NHWC = np.load(folder / "images.npy", mmap_mode="r")
    for row, image_HWC in zip(indices_N.tolist(), images_NHWC, strict=True):
        yield row, hashlib.sha256(image_HWC).digest()
