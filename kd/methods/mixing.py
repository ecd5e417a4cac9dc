"""Turn members' logits into soft targets, and reduce them to what a loss needs.

K members, N or B images, C classes, S temperatures, R entries of a row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kd.component import ConfigError
from kd.methods.losses import constant, log_probs, wide
from kd.methods.shown import Mixing
from kd.methods.trust.base import ByImage

EPSILON = 1e-7
"""Added to the variance of logits, which may be zero."""


def mix(
    logits_KNC: Tensor,
    weights: tuple[float, ...] | Tensor,
    temperature: float,
    mixing: Mixing = "probabilities",
) -> Tensor:
    """Log of the members' weighted soft targets (N, C) at `temperature`.

    Probabilities are mixed by log-sum-exp, so that logits of +-1e3 stay finite; a weight of 0 is
    a log-weight of minus infinity, which drops the member exactly.

    Args:
        logits_KNC: Every member's logits.
        weights: The members' weights: K numbers, or one row per image (N, K).
        temperature: T, which divides the logits before the softmax.
        mixing: Whether to average probabilities or logits.
    """
    logits_KNC = wide(logits_KNC)
    if isinstance(weights, tuple):
        weights = constant(weights, logits_KNC.dtype, logits_KNC.device)
    weights_KN1 = weights.to(logits_KNC).reshape(-1, len(logits_KNC)).T.unsqueeze(2)
    if mixing == "logits":
        return log_probs((weights_KN1 * logits_KNC).sum(dim=0), temperature)
    return torch.logsumexp(log_probs(logits_KNC, temperature) + weights_KN1.log(), dim=0)


def standardized(logits_BC: Tensor) -> Tensor:
    """Logits minus their mean, over their standard deviation (Sun et al., CVPR 2024).

    Raises:
        ConfigError: with two classes, standardised logits are always +-0.71.
    """
    if logits_BC.shape[-1] < 3:
        raise ConfigError("standardize is true; it must be false with only two classes")
    values = wide(logits_BC)
    centred = values - values.mean(dim=-1, keepdim=True)
    variance = values.var(dim=-1, keepdim=True)
    return centred / (variance + EPSILON).sqrt()


def soft_targets(
    logits_KBC: Tensor,
    weights: tuple[float, ...] | Tensor,
    temperatures: tuple[float, ...],
    mixing: Mixing,
    standardize: bool,
) -> Tensor:
    """Log of the soft targets (S, B, C) at each temperature; arguments as in `mix`."""
    if standardize:
        logits_KBC = standardized(logits_KBC)
    return torch.stack([mix(logits_KBC, weights, each, mixing) for each in temperatures])


@dataclass(frozen=True)
class SoftTargets:
    """A reduction of K members' logits to the one row per image that a loss needs.

    Any callable with this signature will do.  It must treat each image independently, since
    cached rows are computed in other batches than the student sees.
    """

    weights_K: tuple[float, ...]
    temperatures: tuple[float, ...]
    mixing: Mixing = "probabilities"
    standardize: bool = False
    trust: ByImage | None = None

    def __call__(self, logits_KBC: Tensor, labels_B: Tensor) -> Tensor:
        """Log of the soft targets, concatenated over temperatures (B, S C), float32.

        If `trust` also weights images, one more column holds their weights.
        """
        weights: tuple[float, ...] | Tensor = self.weights_K
        columns = []
        if self.trust is not None:
            log_probs_KBC = log_probs(logits_KBC)
            weights = combined(self.trust.factors(log_probs_KBC, labels_B), self.weights_K)
            if self.trust.emphasizes:
                emphasis_B = self.trust.emphasis(log_probs_KBC, labels_B, weights)
                columns = [emphasis_B.unsqueeze(1)]
        given = (weights, self.temperatures, self.mixing, self.standardize)
        return torch.cat([*soft_targets(logits_KBC, *given), *columns], dim=1)


@dataclass(frozen=True)
class AllLogits:
    """The reduction that keeps all logits, for weights that change during training."""

    def __call__(self, logits_KBC: Tensor, labels_B: Tensor) -> Tensor:
        """The logits concatenated over members (B, K C); labels are ignored."""
        return logits_KBC.transpose(0, 1).flatten(start_dim=1)


def combined(factors_BK: Tensor, weights_K: tuple[float, ...]) -> Tensor:
    """Ensemble weights times each image's factors, normalised to sum to 1 (B, K).

    Images for which all these products are 0 get the ensemble weights.
    """
    own_K = constant(weights_K, factors_BK.dtype, factors_BK.device)
    product_BK = own_K * factors_BK
    sum_B1 = product_BK.sum(dim=1, keepdim=True)
    return torch.where(sum_B1 > 0, product_BK / sum_B1.clamp(min=1e-30), own_K)
