"""The result of a weighting, and checks of its input.

Shapes: K members, N samples, C classes, G generations, M candidates tried.
"""

from dataclasses import dataclass

import numpy as np

from kd.component import ConfigError, described, require
from kd.weightings.objectives import Objective

SAMPLES_PER_MEMBER = 100  # with fewer, validation noise affects weights more than members do


@dataclass(frozen=True)
class History:
    """A search's progress by generation."""

    evaluations_G: np.ndarray
    """Candidates evaluated so far."""
    best_G: np.ndarray
    """Smallest value in the population."""
    median_G: np.ndarray
    worst_G: np.ndarray
    weights_GK: np.ndarray
    """The best candidate so far."""
    tried_MK: np.ndarray
    """Every candidate, in order."""
    values_M: np.ndarray


@dataclass(frozen=True)
class Found:
    """Ensemble weights, and how far they can be trusted."""

    names: tuple[str, ...]
    weights_K: np.ndarray
    """Non-negative, sum 1, float64; after shrinkage."""
    objective: float
    """The objective's value at `weights_K` on the validation samples, smaller is better."""
    history: History
    evaluations: int = 0
    """Candidates that the search evaluated."""
    gap: float | None = None
    """Certified bound on how far the search ended above the least possible NLL."""
    searched_K: np.ndarray | None = None
    """The search's own optimum, before shrinkage."""
    shrinkage: float | None = None
    """How far towards uniform, in [0, 1], cross-validation moved the weights."""
    temperature: float | None = None
    """The temperature found together with the weights, if one was searched."""
    warnings: tuple[str, ...] = ()

    @property
    def weights(self) -> dict[str, float]:
        """The weights by member."""
        return dict(zip(self.names, self.weights_K.tolist(), strict=True))

    @property
    def searched(self) -> dict[str, float] | None:
        """The search's own optimum by member."""
        if self.searched_K is None:
            return None
        return dict(zip(self.names, self.searched_K.tolist(), strict=True))


def one_step(weights_K: np.ndarray, value: float) -> History:
    """The history of a weighting that does not search."""
    one = np.array([value])
    rows = weights_K[None].copy()
    return History(np.array([1]), one, one, one, rows, rows, one)


def uniform_found(names: tuple[str, ...], objective: Objective) -> Found:
    """Uniform weights, for when there is nothing to search."""
    weights_K = np.full(len(names), 1 / len(names))
    value = float(objective(weights_K[None])[0])
    return Found(names, weights_K, value, one_step(weights_K, value), evaluations=1)


def population_history(tried_MK: np.ndarray, values_M: np.ndarray, size: int) -> History:
    """The history of a search that tried `size` candidates per generation, slot by slot.

    A slot's occupant is its best candidate so far; candidates without a value (NaN) are ignored.
    """
    num_generations = -(-len(values_M) // size)
    padded = np.full(num_generations * size, np.inf)
    padded[: len(values_M)] = np.where(np.isnan(values_M), np.inf, values_M)
    occupants_GS = np.minimum.accumulate(padded.reshape(num_generations, size), axis=0)
    ends = np.minimum(np.arange(1, num_generations + 1) * size, len(values_M))
    best_so_far = np.array([int(np.argmin(padded[:end])) for end in ends])
    return History(
        evaluations_G=ends,
        best_G=occupants_GS.min(axis=1),
        median_G=np.median(occupants_GS, axis=1),
        worst_G=occupants_GS.max(axis=1),
        weights_GK=tried_MK[best_so_far],
        tried_MK=tried_MK,
        values_M=values_M,
    )


def check_logits(logits_KNC: np.ndarray, labels_N: np.ndarray, names: tuple[str, ...]) -> None:
    """Check validation logits and labels.

    Raises:
        ConfigError: wrong shapes or types, no samples, duplicate or missing names, labels out
            of range, or non-finite logits; the message names the member or sample.
    """
    for name, array in (("logits_KNC", logits_KNC), ("labels_N", labels_N)):
        require(isinstance(array, np.ndarray), name, described(array), "an array of numpy")
    if logits_KNC.ndim != 3 or labels_N.shape != logits_KNC.shape[1:2]:
        raise ConfigError(
            f"logits have shape {logits_KNC.shape} and labels {labels_N.shape}; they must be "
            "(members, samples, classes) and (samples,)"
        )
    members, samples, classes = logits_KNC.shape
    if not (members and samples and classes):
        raise ConfigError(
            f"there are {members} members, {samples} validation samples and {classes} classes; "
            "weights need at least one of each (see data.splits.val and assistants)"
        )
    if len(names) != members or len(set(names)) != members:
        raise ConfigError(f"names are {names}; they must be {members} different member names")
    if not np.issubdtype(labels_N.dtype, np.integer):
        raise ConfigError(f"labels are {labels_N.dtype}; they must be integers")
    if labels_N.min() < 0 or labels_N.max() >= classes:
        at = int(np.flatnonzero((labels_N < 0) | (labels_N >= classes))[0])
        raise ConfigError(
            f"label {labels_N[at]} of sample {at} is outside 0..{classes - 1}; "
            "validation samples must all be labelled"
        )
    for name, logits_NC in zip(names, logits_KNC, strict=True):
        bad = int((~np.isfinite(logits_NC)).sum())
        if bad:
            raise ConfigError(f"member {name!r} has {bad} logits that are not finite; retrain it")


def nothing_to_search(logits_KNC: np.ndarray) -> bool:
    """Whether all weights are equivalent: one member, or members with identical logits."""
    return bool((logits_KNC == logits_KNC[0]).all())


def few_samples_warning(num_samples: int, num_members: int) -> tuple[str, ...]:
    """A warning if there are fewer than 100 validation samples per member."""
    if num_samples >= SAMPLES_PER_MEMBER * num_members:
        return ()
    return (
        f"{num_samples} validation samples for {num_members} members: fewer than "
        f"{SAMPLES_PER_MEMBER} per member, so the weights follow noise; trust the held-out "
        "figures, or enlarge data.splits.val",
    )
