"""The guard for accuracy: searched weights must win on held-out samples, too.

Validation accuracy of searched weights is optimistic by up to several points, and such weights are
often worse than those of the least NLL.  So they are searched on four folds and scored on the
fifth, five times; their average is kept only if it beats the NLL's weights by more than one paired
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
    """Searched candidates against rivals, scored on samples that neither was fitted on."""

    mean_D: np.ndarray
    """The mean of the five searched candidates, which is on the simplex, too."""
    gain: float
    """Accuracy of the searched ones minus that of the rivals, in [-1, 1]."""
    error: float
    """Its paired standard error over samples."""

    @property
    def is_won(self) -> bool:
        """Whether the gain is more than one standard error; equality is not a win."""
        # With a samples won and b lost, more than one error means (a - b)^2 > a + b.  Rounding
        # must not decide equality, as for 1 won and 0 lost; the next larger ratio is 1 / N above.
        return self.gain > self.error * (1 + 1e-9)


def held_out_contest(
    fit: Fit,
    rival_fit: Fit,
    is_right: Callable[[np.ndarray, np.ndarray], np.ndarray],
    labels_N: np.ndarray,
    seed: int,
) -> HeldOutContest:
    """Compare two ways of finding weights on the held-out parts of five folds.

    Args:
        fit: the way under test.
        rival_fit: the way to beat.
        is_right: candidate (D,) and indices of samples -> which it classifies correctly, bool.
        labels_N: true classes, for stratified folds.
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
