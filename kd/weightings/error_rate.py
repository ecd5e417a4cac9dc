"""The error rate of weight vectors, counted exactly on few of the rival classes.

Shapes: P candidates, K members, N samples, C classes, R rivals of a sample, M rivals of all.
"""

from collections.abc import Iterator

import numpy as np

CHUNK = 2000  # samples at a time: a P x CHUNK block fits into the L2 cache
RIVALS_CHUNK = 4000  # likewise for rivals; in float32, so twice as many
PAIRS = 2**20  # pairs of rivals at a time, over all samples: their masks fit into the L2 cache


class ErrorRate:
    """Share of samples whose label does not win, without the rival classes that cannot matter.

    Exact on the simplex, for scores that mix linearly (probabilities, or logits averaged as
    logits).  A rival that trails the label in every member can never win; one that leads it in
    every member always does, which decides the sample; one that trails another rival in every
    member is redundant.  Ties go to the lower class index, as in argmax.

    Errors are counted in float32 with a bound on rounding; candidates that have a sample within
    the bound are counted again in float64.
    """

    def __init__(self, scores_KNC: np.ndarray, labels_N: np.ndarray) -> None:
        """Keep, per sample, the margins label - rival of the rivals that can win.

        Samples are sorted by their number of rivals, so that the r-th rivals of all samples that
        have that many form one contiguous block.
        """
        self.num_samples = len(labels_N)
        parts = [
            _rivals(scores_KNC[:, part].astype(np.float64), labels_N[part], part.start)
            for part in chunks(self.num_samples)
        ]
        *pairs, lost = zip(*parts, strict=True)
        sample_M, margins_MK, ties_M = (np.concatenate(column) for column in pairs)
        self.num_lost = sum(lost)
        counts_N = np.bincount(sample_M, minlength=self.num_samples)
        place_N = np.empty(self.num_samples, dtype=np.int64)
        place_N[np.argsort(-counts_N)] = np.arange(self.num_samples)
        place_M = place_N[sample_M]
        rank_M = np.arange(len(sample_M)) - (np.cumsum(counts_N) - counts_N)[sample_M]
        self.blocks = []
        for part in chunks(int((counts_N > 0).sum()), RIVALS_CHUNK):
            chosen = np.flatnonzero((part.start <= place_M) & (place_M < part.stop))
            chosen = chosen[np.lexsort((place_M[chosen], rank_M[chosen]))]
            widths = np.bincount(rank_M[chosen]).tolist()
            self.blocks.append(_Rivals(margins_MK[chosen].T, ties_M[chosen], widths))

    def __call__(self, weights_PK: np.ndarray) -> np.ndarray:
        """Error rates of the candidates, whose rows are on the simplex."""
        wrong_P = np.full(len(weights_PK), self.num_lost)
        doubtful_P = np.zeros(len(weights_PK), dtype=bool)
        single_PK = weights_PK.astype(np.float32)
        for block in self.blocks:
            surely_P, possibly_P = block.bounds(single_PK)
            wrong_P += surely_P
            doubtful_P |= surely_P != possibly_P
        if doubtful_P.any():
            counted = (block.count(weights_PK[doubtful_P]) for block in self.blocks)
            wrong_P[doubtful_P] = sum(counted, start=self.num_lost)
        return wrong_P / self.num_samples


class _Rivals:
    """The rivals of some samples; counts the samples in which any rival wins.

    Columns are the first rival of every sample, then the second of those that have one, ...
    """

    def __init__(self, margins_KM: np.ndarray, ties_M: np.ndarray, widths: list[int]) -> None:
        """Scale each pair's margins to at most 1 for float32, which changes no sign."""
        self.margins_KM, self.widths = margins_KM, widths
        # margin < least positive float means margin <= 0: a rival of lower index wins ties.
        self.least_M = np.where(ties_M, np.nextafter(0.0, 1.0), 0.0)
        scaled_KM = margins_KM / np.abs(margins_KM).max(axis=0)
        self.scaled_KM = np.ascontiguousarray(scaled_KM, dtype=np.float32)
        # Rounding of K products' factors, and of K sums (Higham 2002, section 3.1), doubled.
        self.slack = np.float32((len(margins_KM) + 2) * np.finfo(np.float32).eps)

    def bounds(self, weights_PK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper bounds on the samples lost, from float32 weights: (P,) and (P,)."""
        worst_PN = self._folded(np.minimum, weights_PK @ self.scaled_KM)
        return _row_counts(worst_PN < -self.slack), _row_counts(worst_PN <= self.slack)

    def count(self, weights_PK: np.ndarray) -> np.ndarray:
        """The samples lost: (P,)."""
        wins_PM = weights_PK @ self.margins_KM < self.least_M
        return _row_counts(self._folded(np.logical_or, wins_PM))

    def _folded(self, fold: np.ufunc, values_PM: np.ndarray) -> np.ndarray:
        """Fold the values of a sample's rivals, in place, into its first rival's: (P, N)."""
        end = self.widths[0]
        folded_PN = values_PM[:, :end]
        for width in self.widths[1:]:
            start, end = end, end + width
            fold(folded_PN[:, :width], values_PM[:, start:end], out=folded_PN[:, :width])
        return folded_PN


def _rivals(
    scores_KNC: np.ndarray, labels_N: np.ndarray, start: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """The M (sample, rival) pairs that can decide a sample, in the samples' order.

    Returns:
        Sample index plus `start` (M,), margins label - rival per member (M, K), whether the
        rival wins ties (M,), and the number of samples that every mixture gets wrong.
    """
    samples = np.arange(len(labels_N))
    margins_KNC = scores_KNC[:, samples, labels_N][:, :, None] - scores_KNC
    ties_NC = np.arange(scores_KNC.shape[2]) < labels_N[:, None]
    leads_KNC = np.where(ties_NC, margins_KNC <= 0, margins_KNC < 0)
    leads_KNC[:, samples, labels_N] = False
    lost_N = leads_KNC.all(axis=0).any(axis=1)
    can_win_NC = leads_KNC.any(axis=0) & ~lost_N[:, None]
    kept_NC = np.zeros_like(can_win_NC)
    widths_N = can_win_NC.sum(axis=1)
    line_N = np.argsort(-widths_N)
    begun = 0
    while begun < len(line_N) and (widest := int(widths_N[line_N[begun]])):
        # Samples with about as many rivals together: one with hundreds must not widen all others.
        some = line_N[begun : begun + max(1, PAIRS // widest**2)]
        kept_NC[some] = _undominated(margins_KNC[:, some], ties_NC[some], can_win_NC[some], widest)
        begun += len(some)
    sample_M, rival_M = np.nonzero(kept_NC)
    margins_MK = margins_KNC[:, sample_M, rival_M].T
    return sample_M + start, margins_MK, ties_NC[sample_M, rival_M], int(lost_N.sum())


def _undominated(
    margins_KNC: np.ndarray, ties_NC: np.ndarray, can_win_NC: np.ndarray, widest: int
) -> np.ndarray:
    """The rivals that some mixture lets win without any other: (N, C) bool.

    Args:
        margins_KNC: label - class per member.
        ties_NC: whether the class wins ties with the label.
        can_win_NC: the rivals.
        widest: R, the largest number of rivals of a sample.
    """
    rivals_NR = np.argsort(~can_win_NC, axis=1)[:, :widest]
    kept_NR = np.take_along_axis(can_win_NC, rivals_NR, axis=1)
    ties_NR = np.take_along_axis(ties_NC, rivals_NR, axis=1)
    # [n, a, b]: in any mixture, whenever rival a beats the label, so does b.
    implied_NRR = ~ties_NR[:, :, None] | ties_NR[:, None, :]
    for margins_NR in np.take_along_axis(margins_KNC, rivals_NR[None], axis=2):
        implied_NRR &= margins_NR[:, None, :] <= margins_NR[:, :, None]
    implied_NRR &= kept_NR[:, None, :]
    # Rivals that imply each other are all kept: with real logits they hardly ever occur.
    kept_NR &= ~(implied_NRR & ~implied_NRR.transpose(0, 2, 1)).any(axis=2)
    kept_NC = np.zeros_like(can_win_NC)
    np.put_along_axis(kept_NC, rivals_NR, kept_NR, axis=1)
    return kept_NC


def _row_counts(true_PN: np.ndarray) -> np.ndarray:
    """Number of true values per row: (P,); row by row is 10 times faster than a sum by axis."""
    return np.array([np.count_nonzero(true_N) for true_N in true_PN], dtype=np.int64)


def chunks(size: int, chunk: int = CHUNK) -> Iterator[slice]:
    """Slices of at most `chunk` samples that cover all."""
    for start in range(0, size, chunk):
        yield slice(start, min(start + chunk, size))
