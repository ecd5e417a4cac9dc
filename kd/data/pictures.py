"""One image: from a file of any format to pixels, and from pixels to a square.

Shape suffixes: H W image.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kd.component import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NAMED = 20
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What a file may hold, whatever its name: for EPS, Pillow would start Ghostscript."""


def named(faults: Sequence[str]) -> str:
    """The first faults, one per line, and how many more there are."""
    more = len(faults) - NAMED
    return "\n".join([*faults[:NAMED], *([f"and {more} more"] if more > 0 else [])])


def read_picture(path: Path) -> "NDArray[np.uint8]":
    """Decode one image, turned upright by its EXIF orientation.

    Returns:
        uint8, (H, W) if grey, (H, W, 3) in colour, (H, W, 4) with transparency.

    Raises:
        ConfigError: not an image, truncated, or with pixels of other than 1, 8 or 16 bits.
    """
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with Image.open(path, formats=FORMATS) as file:
            picture = ImageOps.exif_transpose(file)
            picture.load()
    except Exception as error:  # each of Pillow's decoders raises its own types
        raise ConfigError(
            f"{path} cannot be read as an image ({error}); replace or remove it"
        ) from error
    if picture.mode.startswith("I;16"):
        return (np.asarray(picture) >> 8).astype(np.uint8)
    if picture.mode in ("I", "F"):
        raise ConfigError(
            f"{path} has {picture.mode!r} pixels; save it with 8 or 16 bits per channel"
        )
    if picture.has_transparency_data:
        return np.asarray(picture.convert("RGBA"))
    return np.asarray(picture.convert("L" if picture.mode in ("1", "L") else "RGB"))


def to_square(image: "NDArray[np.uint8]", size: int, channels: int) -> "NDArray[np.uint8]":
    """Fit an image into a square: centre crop to the shorter side, then bilinear resize.

    Transparent images are composited on white; colour becomes grey by luminance (ITU-R 601),
    grey becomes colour by repetition.

    Args:
        image: uint8, (H, W) or (H, W, 1 | 3 | 4).
        size: side of the square, in pixels.
        channels: 1 or 3.

    Returns:
        uint8, (size, size, channels).

    Raises:
        ConfigError: `image` has another type or shape.
    """
    import numpy as np

    if image.dtype != np.uint8 or image.ndim not in (2, 3) or 0 in image.shape:
        raise ConfigError(
            f"an image is {image.dtype} {image.shape}; it must be uint8 (H, W, channels)"
        )
    image_HWC = image if image.ndim == 3 else image[:, :, None]
    if image_HWC.shape == (size, size, channels):
        return image_HWC
    if image_HWC.shape[2] not in (1, 3, 4):
        raise ConfigError(f"an image has {image_HWC.shape[2]} channels; it must have 1, 3 or 4")
    from PIL import Image, ImageOps

    picture = Image.fromarray(image_HWC[:, :, 0] if image_HWC.shape[2] == 1 else image_HWC)
    if picture.mode == "RGBA":
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    picture = picture.convert("L" if channels == 1 else "RGB")
    square = ImageOps.fit(picture, (size, size), method=Image.Resampling.BILINEAR)
    return np.asarray(square).reshape(size, size, channels)
