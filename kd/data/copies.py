"""Find the images that are tested on and learned, too, pixel for pixel."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from kd.data.pictures import named
from kd.data.raw import Raw


def copy_warnings(folder: Path, raw: Raw) -> list[str]:
    """A warning for each of val and test that has images which are learned, too, by name.

    Args:
        folder: what `prepare` wrote.
        raw: the data set that it was made from.
    """
    found = {split: pairs for split, pairs in copies(folder).items() if pairs}
    warnings = []
    for split, pairs in found.items():
        names = [[str(raw.files[row] if raw.files else row) for row in pair] for pair in pairs]
        warnings.append(
            f"warning: some images of {split} ({len(pairs)}) are in train or pool, too, which "
            f"flatters figures on {split}; of your own, remove one of each pair:\n"
            + named([" = ".join(pair) for pair in names])
        )
    return warnings


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
