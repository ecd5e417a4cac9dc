"""The guard against overfitting: shrink weights towards uniform, as far as held-out samples say.

Shapes: K members, N samples, C classes, A shares.
"""

from collections.abc import Callable, Iterator

import numpy as np

from kd.component import ConfigError
from kd.weightings.objectives import Objective
from kd.weightings.simplex import toward_uniform

FOLDS = 5
SHARES = np.arange(9) / 8  # 0 keeps the weights, 1 makes them uniform


def folds(labels_N: np.ndarray, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Five stratified folds, each as (indices to fit on, indices held out).

    Raises:
        ConfigError: fewer than five samples.
    """
    if len(labels_N) < FOLDS:
        raise ConfigError(
            f"{len(labels_N)} validation samples; {FOLDS}-fold cross-validation needs at least "
            f"{FOLDS} (see data.splits.val)"
        )
    shuffled = np.random.default_rng(seed).permutation(len(labels_N))
    dealt = shuffled[np.argsort(labels_N[shuffled], kind="stable")]
    fold_N = np.empty(len(labels_N), dtype=np.int64)
    fold_N[dealt] = np.arange(len(labels_N)) % FOLDS
    for fold in range(FOLDS):
        yield np.flatnonzero(fold_N != fold), np.flatnonzero(fold_N == fold)


def shrinkage_by_cross_validation(
    fit: Callable[[np.ndarray], np.ndarray],
    objective_on: Callable[[np.ndarray], Objective],
    labels_N: np.ndarray,
    num_members: int,
    seed: int,
) -> float:
    """The share of uniform weights, in {0, 1/8, ..., 1}, that is best on held-out samples.

    Args:
        fit: indices of samples -> the candidate found on them: weights (K,), or weights and
            more columns, which are not changed.
        objective_on: indices of samples -> the objective on them.
        labels_N: true classes, for stratified folds.
        num_members: K.
        seed: shuffles the folds.

    Returns:
        The share; on ties the larger one, which is safer.
    """
    total_A = np.zeros(len(SHARES))
    for fitted, held_out in folds(labels_N, seed):
        shrunk_AD = np.tile(fit(fitted), (len(SHARES), 1))
        shrunk_AD[:, :num_members] = [
            toward_uniform(shrunk_AD[0, :num_members], share) for share in SHARES
        ]
        total_A += len(held_out) * objective_on(held_out)(shrunk_AD)
    return float(SHARES[np.flatnonzero(total_A == total_A.min())[-1]])
