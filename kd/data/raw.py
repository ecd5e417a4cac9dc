"""The raw form: what reading any data set returns, before resizing and splitting.

Shape suffixes: N samples.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from kd.component import ConfigError, described

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

UNLABELLED = -1


class ImageSequence(Protocol):
    """Images by position, each uint8 (H, W) or (H, W, channels); an array is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> "NDArray[np.uint8]": ...


@dataclass(frozen=True, kw_only=True)
class Raw:
    """Images with their labels, as obtained from their source.

    A data set of your own returns this from its `read()`.  Images too many for one array are
    given as a sequence that decodes image i when it is accessed (by several threads), so they
    are never all in memory; `files` then names the file behind each.
    """

    images: ImageSequence
    """N images, uint8, each (H, W) or (H, W, channels): 1 grey, 3 colour or 4 with alpha."""

    labels_N: "NDArray[np.int64]"
    """Class of each image, counted from 0; -1 if unknown (it goes to the pool)."""

    class_names: tuple[str, ...]
    """Name of each class, in the order of the labels."""

    is_test_N: "NDArray[np.bool_] | None" = None
    """Whether each image is in the source's own test split; None if it has no such split."""

    root: Path | None = None
    """Folder that holds `files`."""

    files: tuple[Path, ...] = ()
    """File of each image, if `images` is not one array."""

    def __post_init__(self) -> None:
        import numpy as np

        num = len(self.images)
        labels_N = np.asarray(self.labels_N)
        object.__setattr__(self, "labels_N", labels_N)
        if self.is_test_N is not None:
            object.__setattr__(self, "is_test_N", np.asarray(self.is_test_N, dtype=bool))
        if num == 0:
            raise ConfigError("the data set has no images")
        names = self.class_names if isinstance(self.class_names, tuple | list) else ()
        if len(names) < 2 or len(set(names)) < len(names):
            raise ConfigError(
                f"class_names is {self.class_names!r}; it must be a tuple of two or more "
                "different names"
            )
        for name in (*names, *map(str, self.files)):
            if not _is_text(name):
                raise ConfigError(f"the name {name!r} is not a string of UTF-8; rename it")
        for name in names:
            if name.splitlines() != [name]:
                raise ConfigError(
                    f"the class name {name!r} is not one line, as labels.txt needs it; rename it"
                )
        if labels_N.shape != (num,) or not np.issubdtype(labels_N.dtype, np.integer):
            raise ConfigError(
                f"labels_N has shape {labels_N.shape} and type {labels_N.dtype}; "
                f"it must hold one integer for each of {num} images"
            )
        if labels_N.min() < UNLABELLED or labels_N.max() >= len(self.class_names):
            raise ConfigError(
                f"labels_N is in {labels_N.min()}..{labels_N.max()}; it must be in "
                f"0..{len(self.class_names) - 1}, or be -1 where unknown"
            )
        if self.is_test_N is not None and self.is_test_N.shape != (num,):
            raise ConfigError(f"is_test_N has shape {self.is_test_N.shape}; it must be ({num},)")
        if self.files:
            if self.root is None or len(self.files) != num:
                raise ConfigError(
                    f"files names {len(self.files)} files under {self.root}; "
                    f"it must name one for each of {num} images, and root their folder"
                )
        elif not isinstance(self.images, np.ndarray) or self.images.dtype != np.uint8:
            raise ConfigError(
                f"images is {described(self.images)}; it must be one uint8 array of numpy, or a "
                "sequence whose files are named"
            )


def _is_text(name: object) -> bool:
    """Whether a name can be written; one read from the file system may hold bytes of no text."""
    try:
        return isinstance(name, str) and name.encode().decode() == name
    except UnicodeEncodeError:
        return False
