"""A small network and small images: enough to learn from, quick to train."""

import torch
from torch import Tensor, nn

from kd.data import Augment, Images
from kd.ensemble import Ensemble, digest_of_tensors
from kd.methods import KD
from kd.recipe import SGD, Recipe
from kd.train import Epoch

CLASSES = 3


def network(seed: int = 0, dropout: float = 0.0) -> nn.Module:
    """Convolution, batch norm, ReLU, pooling, dropout, linear."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),  # its weights have two memory orders, the first one's one
        nn.AvgPool2d(4),  # an adaptive one is not deterministic on a GPU
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(32, CLASSES),
    )


def pictures(
    num: int = 40,
    labelled: int | None = None,
    augment: Augment | None = None,
    device: str = "cpu",
) -> Images:
    """Noise with a bright stripe whose row is the class; the first `labelled` have labels."""
    generator = torch.Generator().manual_seed(7)
    pixels = torch.randint(120, (num, 8, 8, 1), generator=generator, dtype=torch.uint8)
    labels = torch.arange(num) % CLASSES
    for picture, label in zip(pixels, labels, strict=True):
        picture[2 * label + 1] = 255
    if labelled is not None:
        labels = torch.where(torch.arange(num) < labelled, labels, -1)
    views = augment or Augment(shift=1)
    return Images(
        pixels_NHWC=pixels.to(device),
        labels_N=labels.to(device),
        mean=(0.3,),
        std=(0.3,),
        augment=views,
    )


def recipe(**changes: object) -> Recipe:
    """A short recipe, with some settings changed."""
    settings = {"epochs": 3, "batch_size": 8, "optimizer": SGD(lr=0.05)}
    return Recipe(**(settings | changes))


class Guarded(nn.Module):
    """A network that looks at what it is given before it answers: no graph can be traced of it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if not bool(images.isfinite().all()):
            raise ValueError("images must be finite")
        answer: torch.Tensor = self.inner(images)
        return answer


def taught(members: int = 2) -> dict[str, object]:
    """Arguments of fit() by which an ensemble teaches."""
    networks = tuple(network(5 + k) for k in range(members))
    ensemble = Ensemble(networks, (1 / members,) * members)
    return {"method": KD(temperature=2.0, alpha=0.7), "ensemble": ensemble}


def weights_of(model: nn.Module) -> str:
    """A digest that tells two models apart by a single bit."""
    return digest_of_tensors(model.state_dict())


class Memory:
    """A checkpoint that keeps its states, and stops the training after so many saves."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.saved: tuple[dict[str, Tensor], list[Epoch]] | None = None
        self.saves = 0
        self.stop_after = stop_after

    def load(self) -> tuple[dict[str, Tensor], list[Epoch]] | None:
        return self.saved

    def save(self, state: dict[str, Tensor], history: list[Epoch]) -> None:
        # Contiguous, as a file would bring them back.
        plain = {n: t.clone(memory_format=torch.contiguous_format) for n, t in state.items()}
        self.saved = (plain, list(history))
        self.saves += 1
        if self.saves == self.stop_after:
            raise KeyboardInterrupt
