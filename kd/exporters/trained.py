"""The input of an export: a trained network and everything else that goes into the file.

Shapes: N samples, B batch, C classes, H W image.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kd.component import ConfigError
from kd.exporters.files import for_export, in_canonical_memory


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained network, its input format and its class names.

    Raises:
        ConfigError: the network does not give one logit for each class name, or the calibration
            pictures do not have the shape and dtype that it takes.
    """

    module: nn.Module
    """Normalised images (B, channels, H, W) to logits (B, C); neither moved nor changed."""
    image_size: int
    """H and W, in pixels."""
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    """Of each channel, for pixels in [0, 1]; subtracted from a picture."""
    std: tuple[float, ...]
    """Of each channel, for pixels in [0, 1]; the difference is divided by it."""
    calibration_NHWC: Tensor | None = None
    """uint8 pictures of the training data, to calibrate int8 formats with."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Further metadata for the file."""

    def __post_init__(self) -> None:
        with torch.inference_mode():
            logits_1C = for_export(self.module)(torch.zeros(1, *self.image_shape))
        if tuple(logits_1C.shape) != (1, len(self.class_names)):
            raise ConfigError(
                f"the network gives {tuple(logits_1C.shape)} for one image, but there are "
                f"{len(self.class_names)} class names: export it with the names it was trained on"
            )
        pictures = self.calibration_NHWC
        if pictures is not None and (
            tuple(pictures.shape[1:]) != self.picture_shape
            or pictures.dtype != torch.uint8
            or not len(pictures)
        ):
            raise ConfigError(
                f"calibration pictures are {pictures.dtype} of shape {tuple(pictures.shape)}; the "
                f"network needs torch.uint8 of shape {('N', *self.picture_shape)}, at least one: "
                "take them from the training data"
            )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, H, W): one normalised image."""
        return len(self.mean), self.image_size, self.image_size

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """(H, W, channels): one picture."""
        return self.image_size, self.image_size, len(self.mean)

    def served(self, picture_input: bool, network: nn.Module | None = None) -> nn.Module:
        """What a file computes: the network alone, or pictures to probabilities end to end.

        Args:
            picture_input: Whether the file takes pictures.
            network: Used instead of `module`: a quantised copy of it.

        Returns:
            A copy in eval mode, float32, on the CPU.
        """
        network = network or for_export(self.module)
        return FromPicture(network, self.mean, self.std).eval() if picture_input else network

    def example(self, picture_input: bool) -> Tensor:
        """One black picture as a file takes it, to trace the network with."""
        return self.inputs(torch.zeros(1, *self.picture_shape, dtype=torch.uint8), picture_input)

    def description(self) -> dict[str, str]:
        """A file's metadata: mean, std and labels (as JSON), and what `metadata` adds."""
        numbers = {"mean": self.mean, "std": self.std, "labels": self.class_names}
        return {**{name: json.dumps(each) for name, each in numbers.items()}, **self.metadata}

    def inputs(self, pictures_BHWC: Tensor, picture_input: bool) -> Tensor:
        """The pictures as a file takes them: unchanged, or normalised (B, channels, H, W)."""
        return pictures_BHWC if picture_input else self.normalise(pictures_BHWC)

    def normalise(self, pictures_BHWC: Tensor) -> Tensor:
        """Normalise uint8 pictures to images (B, channels, H, W), in channels_last memory."""
        images_BCHW: Tensor = Normalise(self.mean, self.std)(pictures_BHWC)
        return images_BCHW

    def calibration(self, num: int, picture_input: bool = False) -> Tensor:
        """`num` evenly spaced calibration images (or all, if fewer), as a file takes them.

        Raises:
            ConfigError: there are no calibration pictures.
        """
        if self.calibration_NHWC is None:
            raise ConfigError(
                "precision is 'int8', which needs calibration pictures, and there are none: "
                "pass uint8 pictures of the training data as Trained.calibration_NHWC"
            )
        chosen = evenly(len(self.calibration_NHWC), num)
        return self.inputs(self.calibration_NHWC[chosen], picture_input)


class Normalise(nn.Module):
    """uint8 (B, H, W, channels) to float32 (B, channels, H, W), bit-identical to kd.data."""

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([255 * m for m in mean]))
        self.register_buffer("scale", torch.tensor([1 / (255 * s) for s in std]))

    def forward(self, pictures_BHWC: Tensor) -> Tensor:
        """(pixel - 255 mean) * (1 / (255 std))."""
        images_BHWC = (pictures_BHWC.to(torch.float32) - self.mean) * self.scale
        return images_BHWC.permute(0, 3, 1, 2)


class FromPicture(nn.Module):
    """A network with preprocessing and softmax: uint8 pictures to probabilities."""

    def __init__(
        self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        self.normalise = Normalise(mean, std)
        self.network = network

    def forward(self, picture_BHWC: Tensor) -> Tensor:
        """Probabilities (B, C) of uint8 pictures (B, H, W, channels)."""
        # Else decompositions would see channels_last and hard-code its strides.
        images_BCHW = in_canonical_memory(self.normalise(picture_BHWC))
        logits_BC: Tensor = self.network(images_BCHW)
        return logits_BC.softmax(1)


def evenly(num: int, wanted: int) -> Tensor:
    """`wanted` positions spaced evenly over `num`, ascending; all of them if there are fewer."""
    return torch.arange(min(num, wanted)) * num // min(num, wanted)
