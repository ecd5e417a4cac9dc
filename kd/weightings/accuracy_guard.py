"""The guard for accuracy: weights that won on the samples they were chosen for must win again.

Validation accuracy of searched weights is optimistic by up to several points, and such weights are
often worse than those of the least NLL.  So they are searched on four folds, five times, scored on
the fifth, averaged, and kept only where that beats the NLL's weights by more than one paired
standard error.

Shapes: K members, N samples, D = K, or K + 1 with a temperature.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kd.weightings.shrinkage import folds

Fit = Callable[[np.ndarray], np.ndarray]
"""Indices of samples -> the candidate (D,) found on them."""


@dataclass(frozen=True)
class HeldOutContest:
    """How searched candidates did against others on samples that neither had seen."""

    mean_D: np.ndarray
    """The five searched candidates, averaged: weights stay weights."""
    gain: float
    """By how much more often the searched ones were right, in [-1, 1]."""
    error: float
    """Its paired standard error over samples."""

    @property
    def is_won(self) -> bool:
        """Whether the gain is more than one standard error; a tie is not won."""
        # With a samples won and b lost, more than one error is (a - b)^2 > a + b.  Equality, as
        # for 1 won and 0 lost, must not be left to rounding; what comes next is 1 / N larger.
        return self.gain > self.error * (1 + 1e-9)


def held_out_contest(
    fit: Fit,
    rival_fit: Fit,
    is_right: Callable[[np.ndarray, np.ndarray], np.ndarray],
    labels_N: np.ndarray,
    seed: int,
) -> HeldOutContest:
    """Let two ways of finding weights compete on the held-out parts of five folds.

    Args:
        fit: the way that must prove itself.
        rival_fit: the way to beat.
        is_right: candidate (D,) and indices of samples -> which it classifies rightly, bool.
        labels_N: true classes, for even folds.
        seed: shuffles the folds.
    """
    gains_N = np.empty(len(labels_N))
    searched = []
    for fitted, held_out in folds(labels_N, seed):
        searched.append(fit(fitted))
        ours_N, theirs_N = (
            is_right(point_D, held_out) for point_D in (searched[-1], rival_fit(fitted))
        )
        gains_N[held_out] = ours_N.astype(float) - theirs_N
    error = gains_N.std(ddof=1) / np.sqrt(len(gains_N))
    return HeldOutContest(np.mean(searched, axis=0), float(gains_N.mean()), float(error))
