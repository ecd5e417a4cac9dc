"""Views: every augmented image has a number.

A view is a random crop of the zero-padded image, possibly mirrored (the augmentation of He et al.
2016, section 4.2).  Since views are numbered, teacher and student can be shown exactly the same
one, and a teacher's logits for a view can be stored under its number.

Shape suffixes: N samples, V any number of views.
"""

import hashlib

import torch
from torch import Tensor

from kd.component import component, require


@component
class Augment:
    """All shifts by up to `shift` pixels in both directions, each plain or mirrored."""

    shift: int = 0
    """Largest shift in pixels, below the image size; pixels from outside are black (0 before
    normalisation)."""

    flip: bool = False
    """Whether images are also mirrored left to right."""

    def __post_init__(self) -> None:
        require(self.shift >= 0, "shift", self.shift, "0 or more")

    @property
    def num_views(self) -> int:
        """Number of different views of one image."""
        return (2 * self.shift + 1) ** 2 * (2 if self.flip else 1)

    @property
    def identity(self) -> int:
        """Id of the view that leaves the image as it is."""
        return (2 * self.shift + 1) ** 2 // 2

    def decode(self, views_V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Decode view ids.

        Args:
            views_V: ids in [0, num_views).

        Returns:
            dy_V and dx_V, integers in [-shift, shift], and flip_V, bool.  Pixel (y, x) of the view
            is pixel (y + dy, x + dx) of the image; with flip the row is then mirrored.
        """
        side = 2 * self.shift + 1
        offset_V = views_V % side**2
        return offset_V // side - self.shift, offset_V % side - self.shift, views_V >= side**2

    def views_for(self, seed: int, epoch: int, num: int) -> Tensor:
        """The view of each of `num` samples in an epoch, int64 on the CPU.

        A pure function of its arguments and of `shift` and `flip`, the same on every device, so
        that training resumes exactly.
        """
        generator = torch.Generator().manual_seed(key("views", seed, epoch))
        return torch.randint(self.num_views, (num,), generator=generator)


def order_for(seed: int, epoch: int, num: int) -> Tensor:
    """The order in which an epoch visits `num` samples, int64 on the CPU; a pure function."""
    generator = torch.Generator().manual_seed(key("order", seed, epoch))
    return torch.randperm(num, generator=generator)


def key(purpose: str, *parts: int) -> int:
    """A seed from whole numbers: adjacent parts or other purposes give unrelated seeds."""
    digest = hashlib.sha256(" ".join([purpose, *map(str, parts)]).encode()).digest()
    return int.from_bytes(digest[:4])  # PyTorch's CPU generator uses 32 bits of its seed
