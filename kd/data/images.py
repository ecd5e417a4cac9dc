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

from kd.component import ConfigError, described, require
from kd.data.augment import Augment

SEEN_PIXELS = 2**20
"""Pixels per channel in an inference batch: 256 images of 64 x 64, 20 of 224 x 224.  That takes
less memory than training on a usual batch of such images."""
SEEN_IMAGES = 512
"""Images in an inference batch, at most."""

HELD_BYTES = 2 * 2**30
"""Images up to this total are held on the device: 700,000 of 32 x 32, 14,000 of 224 x 224."""


@dataclass(frozen=True, kw_only=True)
class Images:
    """One split, or several joined, with the views that batches may show."""

    pixels_NHWC: Tensor
    """uint8 on the device or, if that would be too large, memory-mapped on the host, from where
    images are copied to the device as batches need them."""

    labels_N: Tensor
    """int64 on the device; -1 where unlabelled."""

    mean: tuple[float, ...]
    """Mean of each channel over train and pool, in [0, 1] units."""

    std: tuple[float, ...]
    """Standard deviation likewise."""

    augment: Augment = Augment()  # noqa: RUF009  (frozen)
    """The views that `batch` can show."""

    beyond_NHWC: tuple[Tensor, ...] = ()
    """Further memory maps, whose images follow these: splits too large to be concatenated."""

    source: str = ""
    """Hash of the prepared data and names of the splits; if "", `identity` hashes the pixels."""

    def __post_init__(self) -> None:
        parts = (self.pixels_NHWC, *self.beyond_NHWC)
        for pixels in parts:
            fits = isinstance(pixels, Tensor) and pixels.dtype == torch.uint8 and pixels.ndim == 4
            wanted = "a uint8 tensor (images, height, width, channels)"
            require(fits, "pixels_NHWC", described(pixels), wanted)
        count, channels = sum(map(len, parts)), self.pixels_NHWC.shape[3]
        labels = self.labels_N
        whole = isinstance(labels, Tensor) and not (labels.is_floating_point())
        fits = whole and labels.shape == (count,)
        wanted = f"a tensor of {count} whole numbers, one for each image"
        require(fits, "labels_N", described(labels), wanted)
        for name in ("mean", "std"):
            value = getattr(self, name)
            wanted = f"a tuple of {channels} numbers, one for each channel of pixels_NHWC"
            require(isinstance(value, tuple) and len(value) == channels, name, value, wanted)
        require(all(each > 0 for each in self.std), "std", self.std, "above 0 for each channel")

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
            splits: "train", "pool", "val" or "test", or several to be concatenated in order.
            device: "cpu" or "cuda".
            augment: the views that batches may show; None for only the plain images.
            held_bytes: if images take more bytes than this, they are read from disk as needed.

        Raises:
            ConfigError: `folder` holds no prepared data, or it is damaged.
        """
        names = (splits,) if isinstance(splits, str) else tuple(splits)
        try:
            record = json.loads((folder / "data.json").read_text("utf-8"))
            pixels = [_open(folder / name / "images.npy") for name in names]
            labels = [_open(folder / name / "labels.npy") for name in names]
        except (OSError, ValueError, EOFError) as error:  # EOFError: an empty .npy file
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
        """A key for these images in this order, whatever their views."""
        if self.source:
            return self.source
        digest = hashlib.sha256(repr(self.image_shape).encode())
        for part_NHWC in (self.pixels_NHWC, *self.beyond_NHWC):
            digest.update(part_NHWC.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    @property
    def home(self) -> torch.device:
        """The images' device; the CPU for memory-mapped images."""
        return self.pixels_NHWC.device

    def __len__(self) -> int:
        return len(self.labels_N)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, H, W) of one image, as a model sees it."""
        _, height, width, channels = self.pixels_NHWC.shape
        return channels, height, width

    @property
    def at_once(self) -> int:
        """The batch size for inference.  It depends only on the images' size, so that rounding
        is the same in every training.
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
            indices_B: positions in these images, int64, on any device; best on the CPU for
                memory-mapped images, since reading a GPU's would block the host.
            views_B: view id of each, as `augment` numbers them; None for the plain images.
            memory_format: the layout of the result; channels_last costs no copy.

        Returns:
            float32 (B, channels, H, W) on the device.
        """
        device = self.labels_N.device
        pixels_BHWC = sent(self._gather(sent(indices_B, self.home), device), device)
        if views_B is not None:
            pixels_BHWC = self._crop(pixels_BHWC, sent(views_B, device))
        return self._normalise(pixels_BHWC).contiguous(memory_format=memory_format)

    def _gather(self, indices_B: Tensor, device: torch.device) -> Tensor:
        """The chosen images as stored, in pinned memory if they will be copied to a GPU."""
        shape = (len(indices_B), *self.pixels_NHWC.shape[1:])
        # PyTorch caches pinned memory, so this does not allocate it anew each time.
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
        """Pad the batch once, then gather all pixels of all views in one step."""
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

        Each step rounds separately, so results are bit-identical on every device.
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
    """What to subtract from a row of pixels, and its factor.

    Cached, since copying numbers to a GPU blocks the host.
    """
    with torch.inference_mode(False):  # else unusable outside of inference mode
        shift = torch.tensor([255 * m for m in mean], device=device).repeat(width)
        scale = torch.tensor([1 / (255 * s) for s in std], device=device).repeat(width)
    return shift, scale


@lru_cache(maxsize=16)
def _places_of(
    augment: Augment, height: int, width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Offsets of each view's rows and columns in a padded image flattened to a row of pixels.

    Cached for all V views: recomputed at each step, they would be a fifth of the operations of a
    small network's step, each of which the host must launch on a GPU.
    """
    with torch.inference_mode(False):  # else unusable outside of inference mode
        shift = augment.shift
        dy_V, dx_V, flip_V = augment.decode(torch.arange(augment.num_views)[:, None])
        y_H, x_W = torch.arange(height), torch.arange(width)
        rows_VH = (y_H + dy_V + shift) * (width + 2 * shift)
        columns_VW = torch.where(flip_V, width - 1 - x_W, x_W) + dx_V + shift
        return rows_VH.to(device), columns_VW.to(device)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`.  Copies to a GPU are asynchronous, so the host reads the next batch
    while the GPU is at work, without a thread.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # else the copy would wait for all of the GPU's queued work
    return tensor.to(device, non_blocking=device.type == "cuda")


def _open(path: Path) -> Tensor:
    """Map a .npy file into memory without reading it."""
    import numpy as np

    # "c" (copy-on-write): nothing writes to it, but torch warns about read-only memory ("r").
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def _join(parts: list[Tensor]) -> Tensor:
    """Concatenate parts; a single non-empty part is returned as it is, still a memory map."""
    filled = [part for part in parts if len(part)] or parts[:1]
    return filled[0] if len(filled) == 1 else torch.cat(filled)
