"""Models for tests, written the way a user writes one of their own."""

import torch
from torch import Tensor, nn


class Tiny(nn.Module):
    """Names only what it needs to know."""

    def __init__(self, num_classes: int, channels: int, width: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3)
        self.linear = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.conv(images).mean((2, 3)))


def from_keywords(**sizes: int) -> nn.Module:
    """Takes whatever it is offered."""
    return Tiny(sizes["num_classes"], sizes["channels"], width=sizes["image_size"])


def seven_classes() -> nn.Module:
    """Cannot be told the number of classes."""
    return Tiny(7, 3)


class WithAuxiliary(Tiny):
    """Returns another kind of thing in training mode."""

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        return (logits, logits) if self.training else logits


class Squeezing(Tiny):
    """Loses the dimension of the batch if it is 1."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).squeeze()


class Choosy(Tiny):
    """Does what the values in an image say, which no exported file can."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(-images if images.sum() > 0 else images)


class Noisy(nn.Module):
    """Draws random numbers and keeps statistics, also in evaluation."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.linear = nn.Linear(3, num_classes)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(self.norm(images).mean((2, 3)) + torch.rand(3))


NOT_A_FUNCTION = 3


def no_module() -> int:
    """Returns no module."""
    return 3
