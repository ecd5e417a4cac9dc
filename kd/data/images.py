"""Prepared images on a device, augmented and normalised there in batches.

Shape suffixes: N samples, B batch, H W image, channels last where the name ends in C.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from kd.component import ConfigError
from kd.data.augment import Augment

SEEN_PIXELS = 2**20
"""Pixels of a channel that are looked at at once where nothing is learned: 256 images of 64 x 64,
20 of 224 x 224.  Less than learning from a usual batch of such images takes."""
SEEN_IMAGES = 512
"""As many small ones at most."""

HELD_BYTES = 2 * 2**30
"""Images up to this size are held on the device: 700,000 of 32 x 32, 14,000 of 224 x 224."""


@dataclass(frozen=True, kw_only=True)
class Images:
    """One split, or several joined, with the views that batches may show."""

    pixels_NHWC: Tensor
    """uint8 on the device, or, where they are too many for it, a memory map on the host, whose
    images are brought to the device as batches need them."""

    labels_N: Tensor
    """int64 on the device; -1 where unlabelled."""

    mean: tuple[float, ...]
    """Mean of each channel over train and pool, in [0, 1] units."""

    std: tuple[float, ...]
    """Standard deviation likewise."""

    augment: Augment = Augment()  # noqa: RUF009  (frozen)
    """The views that `batch` knows by number."""

    beyond_NHWC: tuple[Tensor, ...] = ()
    """Further memory maps, whose images follow these: splits that are too large to be joined."""

    source: str = ""
    """Hash of the prepared data and names of the splits; "" where the pixels themselves tell."""

    @classmethod
    def load(
        cls,
        folder: Path,
        splits: str | Sequence[str],
        *,
        device: str = "cpu",
        augment: Augment | None = None,
        held_bytes: int = HELD_BYTES,
    ) -> "Images":
        """Open splits of prepared data.

        Args:
            folder: what `prepare` wrote.
            splits: "train", "pool", "val" or "test", or several of them to be joined in order.
            device: "cpu" or "cuda".
            augment: the views that batches may show; None for the plain images alone.
            held_bytes: images of more bytes than this are read from disk as they are needed.

        Raises:
            ConfigError: `folder` holds no prepared data, or it is damaged.
        """
        names = (splits,) if isinstance(splits, str) else tuple(splits)
        try:
            record = json.loads((folder / "data.json").read_text("utf-8"))
            pixels = [_open(folder / name / "images.npy") for name in names]
            labels = [_open(folder / name / "labels.npy") for name in names]
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{folder} holds no prepared data ({error}); run stage data"
            ) from error
        filled = [part for part in pixels if len(part)] or pixels[:1]
        if sum(part.nbytes for part in filled) <= held_bytes:
            filled = [_join(filled).to(device)]
        return cls(
            pixels_NHWC=filled[0],
            beyond_NHWC=tuple(filled[1:]),
            labels_N=_join(labels).to(device),
            mean=tuple(record["mean"]),
            std=tuple(record["std"]),
            augment=augment or Augment(),
            source=f"{record['data_hash']} {' '.join(names)}",
        )

    @property
    def identity(self) -> str:
        """Names these images in this order, whatever their views: equal only where they are."""
        if self.source:
            return self.source
        digest = hashlib.sha256()
        for part_NHWC in (self.pixels_NHWC, *self.beyond_NHWC):
            digest.update(part_NHWC.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    @property
    def home(self) -> torch.device:
        """Where the images lie; images that are read from disk lie on the CPU."""
        return self.pixels_NHWC.device

    def __len__(self) -> int:
        return len(self.labels_N)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, H, W): what a model sees of one image."""
        _, height, width, channels = self.pixels_NHWC.shape
        return channels, height, width

    @property
    def at_once(self) -> int:
        """How many images a network is best asked about at once: by their size alone, so that
        answers do not differ in rounding from one training to the next.
        """
        _, height, width = self.image_shape
        return max(1, min(SEEN_IMAGES, SEEN_PIXELS // (height * width)))

    def batch(
        self,
        indices_B: Tensor,
        views_B: Tensor | None = None,
        memory_format: torch.memory_format = torch.channels_last,
    ) -> Tensor:
        """The chosen images, each in its view, normalised.

        Args:
            indices_B: positions in these images, int64, on any device; those of images that are
                read from disk are best on the CPU, since the host waits for a GPU's.
            views_B: view id of each, as `augment` numbers them; None for the plain images.
            memory_format: how they are to lie in memory; they are made channels_last.

        Returns:
            float32 (B, channels, H, W) on the device.
        """
        device = self.labels_N.device
        pixels_BHWC = sent(self._gather(sent(indices_B, self.home), device), device)
        if views_B is not None:
            pixels_BHWC = self._crop(pixels_BHWC, sent(views_B, device))
        return self._normalise(pixels_BHWC).contiguous(memory_format=memory_format)

    def _gather(self, indices_B: Tensor, device: torch.device) -> Tensor:
        """The chosen images as they are, from wherever they lie, on their way to `device`."""
        shape = (len(indices_B), *self.pixels_NHWC.shape[1:])
        # Pinned memory comes from PyTorch's own store: none of it is asked of the system anew.
        pinned = self.home.type == "cpu" and device.type == "cuda"
        chosen_BHWC = self.pixels_NHWC.new_empty(shape, pin_memory=pinned)
        if not self.beyond_NHWC:
            return torch.index_select(self.pixels_NHWC, 0, indices_B, out=chosen_BHWC)
        start = 0
        for part_NHWC in (self.pixels_NHWC, *self.beyond_NHWC):
            here_B = (indices_B >= start) & (indices_B < start + len(part_NHWC))
            chosen_BHWC[here_B] = part_NHWC.index_select(0, indices_B[here_B] - start)
            start += len(part_NHWC)
        return chosen_BHWC

    def _crop(self, pixels_BHWC: Tensor, views_B: Tensor) -> Tensor:
        """Pad the batch once and gather every pixel of every view in one step."""
        shift = self.augment.shift
        batch, height, width, channels = pixels_BHWC.shape
        padded = F.pad(pixels_BHWC, (0, 0, shift, shift, shift, shift))
        rows_VH, columns_VW = _places_of(self.augment, height, width, padded.device)
        area = padded.shape[1] * padded.shape[2]
        first_B = torch.arange(0, batch * area, area, device=padded.device)
        row_BH = rows_VH.index_select(0, views_B) + first_B[:, None]
        position_BHW = row_BH[:, :, None] + columns_VW.index_select(0, views_B)[:, None, :]
        # index_select took 0.9 ms for 128 x 32 x 32 x 3 on one core; advanced indexing 1.5 to 2.5.
        gathered = padded.view(-1, channels).index_select(0, position_BHW.view(-1))
        return gathered.view(batch, height, width, channels)

    def _normalise(self, pixels_BHWC: Tensor) -> Tensor:
        """(pixel / 255 - mean) / std, as (pixel - 255 mean) * (1 / (255 std)).

        Each step rounds on its own, so every device gives the same bits.
        """
        batch, height, width, channels = pixels_BHWC.shape
        mean, scale = _row_of(self.mean, self.std, width, pixels_BHWC.device)
        # Whole rows at once: an inner loop over 3 channels would not vectorise.
        rows = pixels_BHWC.reshape(batch, height, width * channels).to(torch.float32)
        rows = rows.sub_(mean).mul_(scale)
        return rows.view(batch, height, width, channels).permute(0, 3, 1, 2)


@lru_cache(maxsize=16)
def _row_of(
    mean: tuple[float, ...], std: tuple[float, ...], width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """What is taken from, and multiplied into, a row of pixels.

    Made once, since the host waits for a GPU whenever it sends numbers there.
    """
    with torch.inference_mode(False):  # or it could not be used outside of one
        shift = torch.tensor([255 * m for m in mean], device=device).repeat(width)
        scale = torch.tensor([1 / (255 * s) for s in std], device=device).repeat(width)
    return shift, scale


@lru_cache(maxsize=16)
def _places_of(
    augment: Augment, height: int, width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Where each view's rows and columns lie in a padded image that is one long row of pixels.

    Made once for all V views: found anew at each step, a fifth of the operations of a small
    network's step would be these, and a GPU waits for the host to tell it of each.
    """
    with torch.inference_mode(False):  # or they could not be used outside of one
        shift = augment.shift
        dy_V, dx_V, flip_V = augment.decode(torch.arange(augment.num_views)[:, None])
        y_H, x_W = torch.arange(height), torch.arange(width)
        rows_VH = (y_H + dy_V + shift) * (width + 2 * shift)
        columns_VW = torch.where(flip_V, width - 1 - x_W, x_W) + dx_V + shift
        return rows_VH.to(device), columns_VW.to(device)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; on the way to a GPU the host goes on, and so reads the next batch
    while the GPU is at work: no thread is needed for that.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # or the copy would wait for all that the GPU was told before
    return tensor.to(device, non_blocking=device.type == "cuda")


def _open(path: Path) -> Tensor:
    """Map a .npy file into memory without reading it."""
    import numpy as np

    # "c": changes, which nobody makes, would stay private; torch warns of read-only memory ("r").
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def _join(parts: list[Tensor]) -> Tensor:
    """One tensor; a single part that is not empty stays the memory map it is."""
    filled = [part for part in parts if len(part)] or parts[:1]
    return filled[0] if len(filled) == 1 else torch.cat(filled)
