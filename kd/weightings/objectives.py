"""Exact and fast objectives for weight vectors, on cached validation logits.

Every objective takes P candidates at once and returns P values, smaller is better.  They are fast
because the mixture's NLL needs only the true-class column, its Brier score is a quadratic form in
the weights, and its accuracy needs only the rival classes that can ever win (error_rate.py).

Shapes: P candidates, K members, N samples, C classes.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np

from kd.weightings.error_rate import ErrorRate, chunks

Measure = Literal["nll", "accuracy", "brier"]
Mixing = Literal["probabilities", "logits"]
Objective = Callable[[np.ndarray], np.ndarray]

TIE_BREAK = 0.9  # weight of NLL in units of one error: orders candidates with equal error rates
LOG_TEMPERATURE = np.log(8.0)  # searched temperatures lie in [1/8, 8], on a logarithmic scale
FACTORS = 8  # values per logarithm in `_sum_of_logs`


def log_probs(logits_KNC: np.ndarray) -> np.ndarray:
    """Log softmax over the classes, in float64."""
    logits = logits_KNC.astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    logs: np.ndarray = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return logs


def mixed_log_probs(
    weights_K: np.ndarray, logits_KNC: np.ndarray, mixing: Mixing, temperature: float = 1.0
) -> np.ndarray:
    """Log-probabilities of one weighted ensemble: (N, C).

    `probabilities` mixes softmax(z_k / T); `logits` is softmax(sum_k w_k z_k / T), a different
    estimator: the normalised geometric mean.
    """
    if mixing == "logits":
        return log_probs(np.tensordot(weights_K, logits_KNC, axes=1) / temperature)
    logs_KNC = log_probs(logits_KNC / temperature)
    top_NC = logs_KNC.max(axis=0)
    mixed_NC = np.tensordot(weights_K, np.exp(logs_KNC - top_NC), axes=1)
    logs_NC: np.ndarray = np.log(np.maximum(mixed_NC, np.finfo(float).tiny)) + top_NC
    return logs_NC


def objective_on(
    logits_KNC: np.ndarray,
    labels_N: np.ndarray,
    measure: Measure = "nll",
    mixing: Mixing = "probabilities",
    *,
    temperature: bool = False,
) -> Objective:
    """The objective for `measure` and `mixing` on these validation logits.

    Args:
        logits_KNC: every member's logits, finite.
        labels_N: true classes.
        measure: "nll", "brier", or "accuracy": the error rate, ties broken by NLL.
        mixing: average "probabilities" or "logits".
        temperature: candidates have one more column u in [0, 1], which encodes the
            temperature T = 8 ** (2 u - 1) that divides all logits.
    """
    if temperature:
        return _AtTemperature(logits_KNC, labels_N, measure, mixing)
    nll = (MixtureNLL if mixing == "probabilities" else GeometricNLL)(logits_KNC, labels_N)
    if measure == "nll":
        return nll
    if measure == "brier":
        brier = MixtureBrier if mixing == "probabilities" else GeometricBrier
        return brier(logits_KNC, labels_N)
    scores_KNC = np.exp(log_probs(logits_KNC)) if mixing == "probabilities" else logits_KNC
    return TieBrokenErrors(ErrorRate(scores_KNC, labels_N), nll, len(logits_KNC), len(labels_N))


class MixtureNLL:
    """Mean over samples of -log sum_k w_k p_k(label): only the true-class column counts."""

    def __init__(self, logits_KNC: np.ndarray, labels_N: np.ndarray) -> None:
        """Cache p_k(label), each sample scaled by its best member so that nothing underflows."""
        true_KN = log_probs(logits_KNC)[:, np.arange(len(labels_N)), labels_N]
        top_N = true_KN.max(axis=0)
        self.offset = float(-top_N.mean())
        self.likelihoods_KN = np.exp(true_KN - top_N)
        # Copied: multiplying by a view of some columns takes half as long again.
        self.blocks = [self.likelihoods_KN[:, part].copy() for part in chunks(len(labels_N))]

    def __call__(self, weights_PK: np.ndarray) -> np.ndarray:
        """Values of the candidates, whose rows are on the simplex."""
        total_P = np.zeros(len(weights_PK))
        for block_KN in self.blocks:
            total_P -= _sum_of_logs(weights_PK @ block_KN)
        mean_P: np.ndarray = total_P / self.likelihoods_KN.shape[1]
        return mean_P + self.offset


class MixtureBrier:
    """Mean squared distance of mixture and one-hot label, as w' M w.

    With residuals r_k = p_k - onehot and weights that sum to 1, the mixture's residual is
    sum_k w_k r_k, so M_kj = mean_n <r_k, r_j> is all that is needed from the samples.
    """

    def __init__(self, logits_KNC: np.ndarray, labels_N: np.ndarray) -> None:
        """Build M."""
        residuals_KNC = np.exp(log_probs(logits_KNC))
        residuals_KNC[:, np.arange(len(labels_N)), labels_N] -= 1
        flat = residuals_KNC.reshape(len(residuals_KNC), -1)
        self.moments_KK = flat @ flat.T / len(labels_N)

    def __call__(self, weights_PK: np.ndarray) -> np.ndarray:
        """Values of the candidates, whose rows are on the simplex."""
        value_P: np.ndarray = np.einsum("pk,kj,pj->p", weights_PK, self.moments_KK, weights_PK)
        return value_P


class GeometricNLL:
    """Mean over samples of -log softmax(sum_k w_k z_k)[label]."""

    def __init__(self, logits_KNC: np.ndarray, labels_N: np.ndarray) -> None:
        """Cache the logits relative to the label's, with the classes first: (C, K, N)."""
        true_KN1 = logits_KNC[:, np.arange(len(labels_N)), labels_N][:, :, None]
        relative_KNC = logits_KNC.astype(np.float64) - true_KN1
        self.relative_CKN = np.ascontiguousarray(relative_KNC.transpose(2, 0, 1))

    def __call__(self, weights_PK: np.ndarray) -> np.ndarray:
        """Values of the candidates."""
        total_P = np.zeros(len(weights_PK))
        for part in chunks(self.relative_CKN.shape[2]):
            mixed_CPN = weights_PK @ self.relative_CKN[:, :, part]
            top_PN = mixed_CPN.max(axis=0)
            total_P += (top_PN + np.log(np.exp(mixed_CPN - top_PN).sum(axis=0))).sum(axis=1)
        mean_P: np.ndarray = total_P / self.relative_CKN.shape[2]
        return mean_P


class GeometricBrier:
    """Mean squared distance of softmax(sum_k w_k z_k) and one-hot label."""

    def __init__(self, logits_KNC: np.ndarray, labels_N: np.ndarray) -> None:
        """Keep logits and labels, which each candidate needs in full."""
        self.logits_KNC, self.labels_N = logits_KNC, labels_N

    def __call__(self, weights_PK: np.ndarray) -> np.ndarray:
        """Values of the candidates."""
        return np.array(
            [_score(w_K, self.logits_KNC, self.labels_N, "brier", "logits") for w_K in weights_PK]
        )


class TieBrokenErrors:
    """Error rate + 0.9 below_an_error(NLL / NLL of uniform weights) / N.

    The second term is less than one error, so it only orders candidates with equal error rates,
    and gives plateaus a slope.
    """

    def __init__(self, errors: Objective, nll: Objective, num_members: int, num_samples: int):
        """Measure the NLL of uniform weights once."""
        self.errors, self.nll = errors, nll
        self.uniform_nll = float(nll(np.full((1, num_members), 1 / num_members))[0])
        self.share = TIE_BREAK / num_samples

    def __call__(self, weights_PK: np.ndarray) -> np.ndarray:
        """Values of the candidates, whose rows are on the simplex."""
        if self.uniform_nll <= 0:  # already certain of every label
            return self.errors(weights_PK)
        relative_P = below_an_error(self.nll(weights_PK) / self.uniform_nll)
        return self.errors(weights_PK) + self.share * relative_P


def below_an_error(relative_P: np.ndarray) -> np.ndarray:
    """The identity up to 1, then saturating at 1.1: a single member's NLL is mostly above that of
    uniform weights, and equally accurate members must still differ.
    """
    bent_P: np.ndarray = np.minimum(relative_P, 1.0) + 0.1 * (1 - 1 / np.maximum(relative_P, 1.0))
    return bent_P


class _AtTemperature:
    """Any measure, one candidate at a time, with a temperature as its last column."""

    def __init__(
        self, logits_KNC: np.ndarray, labels_N: np.ndarray, measure: Measure, mixing: Mixing
    ) -> None:
        self.given = (logits_KNC.astype(np.float64), labels_N, measure, mixing)
        uniform_K = np.full(len(logits_KNC), 1 / len(logits_KNC))
        self.uniform_nll = _score(uniform_K, self.given[0], labels_N, "nll", mixing)

    def __call__(self, points_PD: np.ndarray) -> np.ndarray:
        return np.array([self._value(point_D[:-1], point_D[-1]) for point_D in points_PD])

    def _value(self, weights_K: np.ndarray, unit: float) -> float:
        logits_KNC, labels_N, measure, mixing = self.given
        at = (weights_K, logits_KNC / temperature_of(unit), labels_N)
        if measure != "accuracy":
            return _score(*at, measure, mixing)
        errors = _score(*at, "accuracy", mixing)
        relative = _score(*at, "nll", mixing) / max(self.uniform_nll, 1e-300)
        return errors + TIE_BREAK / len(labels_N) * float(below_an_error(np.array(relative)))


def temperature_of(unit: float) -> float:
    """The temperature that a column's value in [0, 1] encodes."""
    return float(np.exp((2 * unit - 1) * LOG_TEMPERATURE))


def sample_scores(log_probs_NC: np.ndarray, labels_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each sample's NLL and whether it is classified correctly: (N,) and (N,) bool."""
    nll_N = -log_probs_NC[np.arange(len(labels_N)), labels_N]
    return nll_N, log_probs_NC.argmax(axis=1) == labels_N


def _score(
    weights_K: np.ndarray,
    logits_KNC: np.ndarray,
    labels_N: np.ndarray,
    measure: Measure,
    mixing: Mixing,
) -> float:
    """One candidate's score, computed directly; the fast objectives must equal it."""
    mixed_NC = mixed_log_probs(weights_K, logits_KNC, mixing)
    if measure == "brier":
        residuals_NC = np.exp(mixed_NC)
        residuals_NC[np.arange(len(labels_N)), labels_N] -= 1
        return float((residuals_NC**2).sum(axis=1).mean())
    nll_N, right_N = sample_scores(mixed_NC, labels_N)
    return float(nll_N.mean() if measure == "nll" else 1 - right_N.mean())


def _sum_of_logs(values_PN: np.ndarray) -> np.ndarray:
    """Sum over samples of log(values), values in [0, 1]: (P,).

    One logarithm per product of 8 values, which is 3 times faster; one per value if a product
    is near underflow.
    """
    tiny, eps = np.finfo(float).tiny, np.finfo(float).eps
    grouped = values_PN.shape[1] // FACTORS * FACTORS
    factors_PFN = values_PN[:, :grouped].reshape(len(values_PN), FACTORS, -1)
    products_PN = np.multiply.reduce(factors_PFN, axis=1)
    if grouped and products_PN.min() < tiny / eps:
        grouped, products_PN = 0, products_PN[:, :0]
    total_P: np.ndarray = np.log(np.maximum(values_PN[:, grouped:], tiny)).sum(axis=1)
    total_P += np.log(products_PN).sum(axis=1)
    return total_P
