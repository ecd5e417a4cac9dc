"""What is exported: a trained network, with all that a file can hold besides its weights.

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
    """A network, the pictures it understands, and the names of what it tells apart.

    Raises:
        ConfigError: the network does not give one logit for each class name, or the calibration
            pictures are not such as it takes.
    """

    module: nn.Module
    """Normalised images (B, channels, H, W) to logits (B, C); neither moved nor changed."""
    image_size: int
    """H and W, in pixels."""
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    """Of each channel, of pixels in [0, 1]: what is taken from a picture."""
    std: tuple[float, ...]
    """Of each channel, of pixels in [0, 1]: what the rest is divided by."""
    calibration_NHWC: Tensor | None = None
    """uint8 pictures of the training data, from which int8 formats learn their ranges."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """What else the file should say of itself, where its format has room."""

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
        """What a file computes: the network alone, or all the way from pictures to probabilities.

        Args:
            picture_input: Whether the file takes pictures.
            network: Stands in for `module`: a quantised copy of it.

        Returns:
            A copy in eval mode, float32, on the CPU.
        """
        network = network or for_export(self.module)
        return FromPicture(network, self.mean, self.std).eval() if picture_input else network

    def example(self, picture_input: bool) -> Tensor:
        """One black picture as a file takes it, to trace the network with."""
        return self.inputs(torch.zeros(1, *self.picture_shape, dtype=torch.uint8), picture_input)

    def description(self) -> dict[str, str]:
        """What files say of themselves: how pictures are normalised, the class names, and more."""
        numbers = {"mean": self.mean, "std": self.std, "labels": self.class_names}
        return {**{name: json.dumps(each) for name, each in numbers.items()}, **self.metadata}

    def inputs(self, pictures_BHWC: Tensor, picture_input: bool) -> Tensor:
        """The pictures as a file takes them: as they are, or normalised (B, channels, H, W)."""
        return pictures_BHWC if picture_input else self.normalise(pictures_BHWC)

    def normalise(self, pictures_BHWC: Tensor) -> Tensor:
        """Normalised images (B, channels, H, W), in channels_last memory, of uint8 pictures."""
        images_BCHW: Tensor = Normalise(self.mean, self.std)(pictures_BHWC)
        return images_BCHW

    def calibration(self, num: int, picture_input: bool = False) -> Tensor:
        """`num` training images (or all, if there are fewer), spread evenly, as a file takes them.

        Raises:
            ConfigError: the network came without calibration pictures.
        """
        if self.calibration_NHWC is None:
            raise ConfigError(
                "precision is 'int8', which needs calibration pictures, and there are none: "
                "pass uint8 pictures of the training data as Trained.calibration_NHWC"
            )
        chosen = evenly(len(self.calibration_NHWC), num)
        return self.inputs(self.calibration_NHWC[chosen], picture_input)


class Normalise(nn.Module):
    """uint8 (B, H, W, channels) to float32 (B, channels, H, W), bit for bit as kd.data does it."""

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
    """What a phone has (a picture) to what it shows (probabilities)."""

    def __init__(
        self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        self.normalise = Normalise(mean, std)
        self.network = network

    def forward(self, picture_BHWC: Tensor) -> Tensor:
        """Probabilities (B, C) of uint8 pictures (B, H, W, channels)."""
        # Else decompositions would see channels_last and spell out its strides.
        images_BCHW = in_canonical_memory(self.normalise(picture_BHWC))
        logits_BC: Tensor = self.network(images_BCHW)
        return logits_BC.softmax(1)


def evenly(num: int, wanted: int) -> Tensor:
    """`wanted` positions spread evenly over `num`, ascending; each once if there are fewer."""
    return torch.arange(min(num, wanted)) * num // min(num, wanted)
