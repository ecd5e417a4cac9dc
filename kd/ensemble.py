"""Ensemble: frozen members and their weights.  A lone teacher is an ensemble of one.

B batch, K members, N images, V views, C classes.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.component import require
from kd.data import Images

Mixing = Literal["probabilities", "logits"]
Targets = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Soft log-probs (B, C) of a batch: (images (B, channels, H, W), indices (B,), views (B,))."""

CACHE_BYTES = 2**30
"""Largest table of soft targets that `auto` will keep in memory."""


@dataclass(frozen=True)
class Ensemble:
    """Trained networks that teach, and how much each of them counts.

    Members are put into evaluation mode and their parameters frozen: without the first, their
    batch statistics drift even under no_grad; without the second, each step builds their graph.
    """

    members: tuple[nn.Module, ...]
    weights_K: tuple[float, ...]
    """At least 0 each, summing to 1."""
    mixing: Mixing = "probabilities"
    """probabilities: sum_k w_k softmax(z_k / T), which is what a weighted sum of losses gives;
    logits: softmax(sum_k w_k z_k / T), another estimator with another name."""

    def __post_init__(self) -> None:
        same = len(self.members) == len(self.weights_K) > 0
        require(same, "weights_K", self.weights_K, f"one for each of {len(self.members)} members")
        valid = all(w >= 0 for w in self.weights_K) and math.isclose(
            sum(self.weights_K), 1, abs_tol=1e-6
        )
        require(valid, "weights_K", self.weights_K, "at least 0 each and 1 together")
        for member in self.members:
            member.eval().requires_grad_(False)

    def logits(self, images_B: Tensor) -> Tensor:
        """Every member's logits (K, B, C), in float32."""
        with torch.inference_mode():
            return torch.stack([member(images_B).float() for member in self.members])

    def log_probs(self, images_B: Tensor, temperature: float) -> Tensor:
        """Log of the soft targets (B, C) at `temperature`."""
        mixed_BC = mix(self.logits(images_B), self.weights_K, temperature, self.mixing)
        return mixed_BC.clone()  # a clone made outside inference mode may enter a loss

    def fingerprint(self) -> str:
        """SHA-256 over all members' parameters and buffers: unchanged as long as none learns."""
        return digest_of_tensors(
            {
                f"{index}/{name}": tensor
                for index, member in enumerate(self.members)
                for name, tensor in member.state_dict().items()
            }
        )


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over named tensors, whatever their order and device."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        raw = tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(raw.numpy().data)
    return digest.hexdigest()


def mix(
    logits_KNC: Tensor,
    weights_K: tuple[float, ...],
    temperature: float,
    mixing: Mixing = "probabilities",
) -> Tensor:
    """Log of the members' weighted soft targets (N, C) at `temperature`.

    Mixing probabilities is done by log-sum-exp, so that logits of +-1e3 stay finite; a weight
    of 0 is a log-weight of minus infinity, which the sum leaves out exactly.
    """
    weights_K11 = torch.tensor(weights_K, dtype=torch.float32, device=logits_KNC.device)
    weights_K11 = weights_K11.view(-1, 1, 1)
    if mixing == "logits":
        return F.log_softmax((weights_K11 * logits_KNC).sum(dim=0) / temperature, dim=-1)
    log_probs_KNC = F.log_softmax(logits_KNC / temperature, dim=-1)
    return torch.logsumexp(log_probs_KNC + weights_K11.log(), dim=0)


def online_targets(ensemble: Ensemble, temperature: float) -> Targets:
    """Soft targets computed from the very images that the student sees."""
    return lambda images_B, indices_B, views_B: ensemble.log_probs(images_B, temperature)


def cached_targets(
    ensemble: Ensemble, temperature: float, images: Images, batch_size: int = 256
) -> Targets:
    """Soft targets of every view of every image, computed once and looked up from then on.

    Exact: a view's id names its shift and flip, so the row that is looked up was computed from
    the same pixels that the student sees.
    """

    def row(view: int) -> Tensor:
        parts = torch.arange(len(images), device=images.labels_N.device).split(batch_size)
        batches = (images.batch(part, torch.full_like(part, view)) for part in parts)
        return torch.cat([ensemble.log_probs(batch, temperature) for batch in batches])

    table_VNC = torch.stack([row(view) for view in range(images.augment.num_views)])
    return lambda images_B, indices_B, views_B: table_VNC[views_B, indices_B]


def cache_pays(images: Images, num_classes: int, epochs: int) -> bool:
    """Whether computing each view once costs less than on-line targets, and fits in memory."""
    num_views = images.augment.num_views
    return num_views < epochs and 4 * len(images) * num_classes * num_views <= CACHE_BYTES
