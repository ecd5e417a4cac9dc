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

CENTRING = 0.1  # each step aims at this share of the mean of w z
NEGLIGIBLE = 1e-3  # weights below this are rounded to 0 if the certificate allows it


@component
class ExpectationMaximization:
    """The weights that EM converges to, found by Newton's method: the NLL is convex in them.

    With g_k = mean_n p_k(label_n) / sum_j w_j p_j(label_n), a step of EM is w_k <- w_k g_k, and
    NLL(w) - min NLL <= max_k g_k - 1 (duality gap; Dempster, Laird & Rubin 1977; Cover 1984).
    But where members are almost equally good, EM takes far too many steps.

    min NLL(w) + sum_k w_k over w >= 0 has the same solution: 1 - g = z >= 0 and w z = 0.  An
    interior-point method follows w_k z_k = m for m -> 0 (Boyd & Vandenberghe 2004, section 11.7;
    the relaxed sum: Kim, Carbonetto, Stephens & Anitescu 2020).  The normalised weights' gap is
    then K m, however little the members differ, so some 20 steps suffice.
    """

    kind: Literal["expectation_maximization"] = "expectation_maximization"
    tolerance: float = 1e-12
    """Stop at this certified distance from the least NLL."""
    iterations: int = 100
    """Maximum number of steps; the gap reached is reported."""

    def __post_init__(self) -> None:
        """Check the settings."""
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
        """The weights of least NLL on these samples, deterministic and without shrinkage."""
        check_logits(logits_KNC, labels_N, names)
        nll = MixtureNLL(logits_KNC, labels_N)
        if nothing_to_search(logits_KNC):
            return uniform_found(names, nll)
        weights_K, gap, path = self.minimum(nll)
        steps = np.arange(1, len(path) + 1)
        rows = np.array(path)
        values = nll(rows)
        warnings = few_samples_warning(len(labels_N), len(names))
        if gap > self.tolerance:
            warnings += (
                f"the search stopped at a gap of {gap:.1e} after {self.iterations} steps",
            )
        return Found(
            names,
            weights_K,
            float(nll(weights_K[None])[0]),
            History(steps, values, values, values, rows, rows, values),
            evaluations=len(path),
            gap=gap,
            warnings=warnings,
        )

    def minimum(self, nll: MixtureNLL) -> tuple[np.ndarray, float, list[np.ndarray]]:
        """Minimise `nll`: weights (K,), certified gap, and the weights at every step."""
        likelihoods_KN = nll.likelihoods_KN
        weights_K = np.full(len(likelihoods_KN), 1 / len(likelihoods_KN))
        prices_K = np.ones_like(weights_K)
        path = [weights_K]
        while len(path) < self.iterations and _gap(likelihoods_KN, path[-1]) > self.tolerance:
            weights_K, prices_K = _stepped(likelihoods_KN, weights_K, prices_K)
            path.append(weights_K / weights_K.sum())
        path[-1] = self._rounded(likelihoods_KN, path[-1])
        return path[-1], max(0.0, _gap(likelihoods_KN, path[-1])), path

    def _rounded(self, likelihoods_KN: np.ndarray, weights_K: np.ndarray) -> np.ndarray:
        """Set negligible weights to 0, as long as the gap stays within tolerance."""
        for member in np.argsort(weights_K, kind="stable"):
            if weights_K[member] < NEGLIGIBLE:
                without_K = weights_K.copy()
                without_K[member] = 0.0
                without_K /= without_K.sum()
                if _gap(likelihoods_KN, without_K) <= self.tolerance:
                    weights_K = without_K
        return weights_K


def _stepped(
    likelihoods_KN: np.ndarray, weights_K: np.ndarray, prices_K: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A primal-dual Newton step towards w z = a tenth of its current mean.

    The Hessian of the NLL is that of least squares, J'J; scaling by sqrt(w) keeps the system
    well-conditioned as weights go to 0.
    """
    mixed_N, gains_K = _mixed_and_gains(likelihoods_KN, weights_K)
    aim = CENTRING * (weights_K @ prices_K) / len(weights_K)
    scale_K = np.sqrt(weights_K)
    jacobian_KN = scale_K[:, None] * likelihoods_KN / mixed_N / np.sqrt(len(mixed_N))
    slope_K = scale_K * (gains_K - 1) + aim / scale_K
    step_K = scale_K * np.linalg.solve(jacobian_KN @ jacobian_KN.T + np.diag(prices_K), slope_K)
    price_step_K = (aim - prices_K * step_K) / weights_K - prices_K
    return _inside(weights_K, step_K), _inside(prices_K, price_step_K)


def _inside(values_K: np.ndarray, step_K: np.ndarray) -> np.ndarray:
    """The values after the step, shortened to leave at least a tenth of each value."""
    shrinks = float((-step_K / values_K).max())
    stepped_K: np.ndarray = values_K + min(1.0, 0.9 / max(shrinks, 0.9)) * step_K
    return stepped_K


def _mixed_and_gains(
    likelihoods_KN: np.ndarray, weights_K: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(q w)_n: (N,), and g_k = mean_n q_kn / (q w)_n: (K,)."""
    mixed_N = np.maximum(weights_K @ likelihoods_KN, np.finfo(float).tiny)
    return mixed_N, likelihoods_KN @ (1 / mixed_N) / len(mixed_N)


def _gap(likelihoods_KN: np.ndarray, weights_K: np.ndarray) -> float:
    """Bound on how far the NLL of weights that sum to 1 is above the least one."""
    return float(_mixed_and_gains(likelihoods_KN, weights_K)[1].max() - 1)
