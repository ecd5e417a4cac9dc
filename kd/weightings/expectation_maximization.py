"""The exact minimum of the mixture's NLL, with a certificate.

Shapes: K members, N samples, C classes.
"""

from pathlib import Path
from typing import Literal

import numpy as np

from kd.component import component, require
from kd.weightings.found import (
    Found,
    History,
    check_logits,
    few_samples_warning,
    nothing_to_search,
    uniform_found,
)
from kd.weightings.objectives import MixtureNLL

OVER_RELAXATION = 1.8  # of the EM step; 1 is plain EM, and below 2 it still converges locally
NEGLIGIBLE = 1e-9  # weights below this are rounded to 0 when the certificate allows it


@component
class ExpectationMaximization:
    """The NLL of a mixture is convex in its weights, so EM finds its minimum, and proves it.

    With g_k = mean_n p_k(label_n) / sum_j w_j p_j(label_n), the step is w_k <- w_k g_k, and
    NLL(w) - min NLL <= max_k g_k - 1 (duality gap; Dempster, Laird & Rubin 1977; Cover 1984).
    """

    kind: Literal["expectation_maximization"] = "expectation_maximization"
    tolerance: float = 1e-9
    """Certified distance from the least NLL at which it stops."""
    iterations: int = 100_000
    """The most steps; the gap that is reached is reported."""

    def __post_init__(self) -> None:
        """Refuse tolerances that can never be reached."""
        require(self.tolerance > 0, "tolerance", self.tolerance, "above 0")
        require(self.iterations >= 1, "iterations", self.iterations, "at least 1")

    def find(
        self,
        logits_KNC: np.ndarray,
        labels_N: np.ndarray,
        names: tuple[str, ...],
        seed: int,
        study_path: Path | None = None,
    ) -> Found:
        """The weights of least NLL on these samples; nothing is random, nothing is shrunk."""
        check_logits(logits_KNC, labels_N, names)
        nll = MixtureNLL(logits_KNC, labels_N)
        if nothing_to_search(logits_KNC):
            return uniform_found(names, nll)
        weights_K, gap, path = self.minimum(nll)
        steps = np.array(sorted(path))
        rows = np.array([path[step] for step in steps])
        values = nll(rows)
        warnings = few_samples_warning(len(labels_N), len(names))
        if gap > self.tolerance:
            warnings += (f"EM stopped at a gap of {gap:.1e} after {self.iterations} steps",)
        return Found(
            names,
            weights_K,
            float(nll(weights_K[None])[0]),
            History(steps, values, values, values, rows, rows, values),
            evaluations=int(steps[-1]),
            gap=gap,
            warnings=warnings,
        )

    def minimum(self, nll: MixtureNLL) -> tuple[np.ndarray, float, dict[int, np.ndarray]]:
        """Minimise `nll`: weights (K,), certified gap, and weights at steps 1, 2, 4, ..."""
        likelihoods_KN = nll.likelihoods_KN
        weights_K = np.full(len(likelihoods_KN), 1 / len(likelihoods_KN))
        value, gains_K = _gains(likelihoods_KN, weights_K)
        path, step = {1: weights_K}, 1
        for step in range(2, self.iterations + 1):
            if gains_K.max() - 1 <= self.tolerance:
                break
            tried_K = weights_K * gains_K**OVER_RELAXATION
            tried_K /= tried_K.sum()
            tried_value, tried_gains_K = _gains(likelihoods_KN, tried_K)
            if tried_value > value:  # the long step overshot; EM's own step never does
                tried_K = weights_K * gains_K
                tried_value, tried_gains_K = _gains(likelihoods_KN, tried_K)
            weights_K, value, gains_K = tried_K, tried_value, tried_gains_K
            if step & (step - 1) == 0:
                path[step] = weights_K
        weights_K = self._rounded(likelihoods_KN, weights_K)
        path[step] = weights_K
        return weights_K, max(0.0, float(_gains(likelihoods_KN, weights_K)[1].max() - 1)), path

    def _rounded(self, likelihoods_KN: np.ndarray, weights_K: np.ndarray) -> np.ndarray:
        """The weights without negligible ones, where that stays within tolerance."""
        rounded_K = np.where(weights_K < NEGLIGIBLE, 0.0, weights_K)
        rounded_K /= rounded_K.sum()
        stays = _gains(likelihoods_KN, rounded_K)[1].max() - 1 <= self.tolerance
        return rounded_K if stays else weights_K / weights_K.sum()


def _gains(likelihoods_KN: np.ndarray, weights_K: np.ndarray) -> tuple[float, np.ndarray]:
    """NLL up to its constant, and g_k = mean_n q_kn / (q w)_n: (K,)."""
    mixed_N = np.maximum(weights_K @ likelihoods_KN, np.finfo(float).tiny)
    return float(-np.log(mixed_N).mean()), likelihoods_KN @ (1 / mixed_N) / len(mixed_N)
