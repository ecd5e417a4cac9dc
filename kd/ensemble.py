"""Ensemble: frozen members and their weights.  A lone teacher is an ensemble of one.

B batch, K members, N images, C classes.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kd.component import require
from kd.methods import Members, Mixing


@dataclass(frozen=True)
class Ensemble:
    """Trained networks that teach, and how much each of them counts.

    Members are put in eval mode and their parameters frozen: otherwise their batch statistics
    would drift even under no_grad, and each step would build their autograd graph.
    """

    members: tuple[nn.Module, ...]
    weights_K: tuple[float, ...]
    """At least 0 each, summing to 1."""
    mixing: Mixing = "probabilities"
    """What is averaged; see `kd.methods.Members`."""
    names: tuple[str, ...] = ()
    """One per member; by default their positions."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "members", tuple(self.members))
        object.__setattr__(self, "weights_K", tuple(map(float, self.weights_K)))
        same = len(self.members) == len(self.weights_K) > 0
        require(same, "weights_K", self.weights_K, f"one for each of {len(self.members)} members")
        valid = all(w >= 0 for w in self.weights_K) and math.isclose(
            sum(self.weights_K), 1, abs_tol=1e-6
        )
        require(valid, "weights_K", self.weights_K, "at least 0 each and 1 together")
        if not self.names:
            object.__setattr__(self, "names", tuple(map(str, range(len(self.members)))))
        require(len(self.names) == len(self.members), "names", self.names, "one for each member")
        for member in self.members:
            member.eval().requires_grad_(False)

    def logits(self, images_B: Tensor) -> Tensor:
        """Every member's logits (K, B, C), in float32."""
        with torch.inference_mode():
            return torch.stack([member(images_B).float() for member in self.members])

    def described(self) -> Members:
        """What a method may know about the members."""
        return Members(self.names, self.weights_K, self.mixing)

    def fingerprint(self) -> str:
        """SHA-256 over all members' parameters and buffers: unchanged unless one is trained."""
        return digest_of_tensors(
            {
                f"{index}/{name}": tensor
                for index, member in enumerate(self.members)
                for name, tensor in member.state_dict().items()
            }
        )


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over named tensors; their order and device do not matter."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        raw = tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(raw.numpy().data)
    return digest.hexdigest()
