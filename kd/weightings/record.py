"""The record of a weight set: its gain on held-out samples.

Shapes: K members, N samples, C classes.
"""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kd.weightings.best_single import BestSingle
from kd.weightings.differential_evolution import DifferentialEvolution
from kd.weightings.expectation_maximization import ExpectationMaximization
from kd.weightings.found import Found
from kd.weightings.objectives import Mixing, mixed_log_probs, sample_scores
from kd.weightings.shrinkage import folds
from kd.weightings.uniform import Uniform

if TYPE_CHECKING:
    from kd.weightings import Weighting


@dataclass(frozen=True)
class HeldOut:
    """Scores of every validation sample by weights that were found without it."""

    nll_N: np.ndarray
    right_N: np.ndarray
    """Whether the sample was classified correctly, bool."""

    def gain_over(self, other: "HeldOut") -> dict[str, float]:
        """The reduction in NLL and gain in accuracy over `other`, with paired standard errors."""
        nll, nll_se = _mean_and_error(other.nll_N - self.nll_N)
        accuracy, accuracy_se = _mean_and_error(
            self.right_N.astype(float) - other.right_N.astype(float)
        )
        return {"nll": nll, "accuracy": accuracy, "nll_se": nll_se, "accuracy_se": accuracy_se}


def cross_fitted(
    weighting: "Weighting",
    logits_KNC: np.ndarray,
    labels_N: np.ndarray,
    names: tuple[str, ...],
    seed: int,
) -> HeldOut:
    """Find weights on four folds, score the fifth, five times.

    Args:
        weighting: how weights are found; without an Optuna study.
        logits_KNC: every member's validation logits.
        labels_N: true classes.
        names: the members, in order.
        seed: of the folds and of the searches.

    Raises:
        ConfigError: fewer than 5 samples, or the weighting refuses the input.
    """
    if isinstance(weighting, DifferentialEvolution):
        weighting = dataclasses.replace(weighting, study=False)
    nll_N, right_N = np.empty(len(labels_N)), np.empty(len(labels_N), dtype=bool)
    for fitted, held_out in folds(labels_N, seed):
        found = weighting.find(logits_KNC[:, fitted], labels_N[fitted], names, seed)
        nll_N[held_out], right_N[held_out] = _scores(
            weighting, found, logits_KNC[:, held_out], labels_N[held_out]
        )
    return HeldOut(nll_N, right_N)


def weight_record(
    weighting: "Weighting",
    found: Found,
    logits_KNC: np.ndarray,
    labels_N: np.ndarray,
    seed: int,
) -> dict[str, Any]:
    """The content of weights.json: the chosen weights, the references, and the held-out gain.

    Args:
        weighting: the configured one.
        found: its result on these samples.
        logits_KNC: every member's validation logits.
        labels_N: true classes.
        seed: of the folds.
    """
    names = found.names
    given = (logits_KNC, labels_N, names, seed)
    references: dict[str, Weighting] = {
        "uniform": Uniform(),
        "best_single": BestSingle(),
        "expectation_maximization": ExpectationMaximization(),
    }
    weightings = {"chosen": weighting, **references}
    all_found = {"chosen": found, **{name: w.find(*given) for name, w in references.items()}}
    held_out = {name: cross_fitted(w, *given) for name, w in weightings.items()}
    return {
        "members": list(names),
        "weights": found.weights,
        "weighting": dataclasses.asdict(weighting),
        "num_val": len(labels_N),
        "sets": {
            name: _set_record(weightings[name], each, held_out[name], logits_KNC, labels_N)
            for name, each in all_found.items()
        },
        "gain": {
            "over_uniform": held_out["chosen"].gain_over(held_out["uniform"]),
            "over_best_single": held_out["chosen"].gain_over(held_out["best_single"]),
        },
    }


def _set_record(
    weighting: "Weighting",
    found: Found,
    held_out: HeldOut,
    logits_KNC: np.ndarray,
    labels_N: np.ndarray,
) -> dict[str, Any]:
    nll_N, right_N = _scores(weighting, found, logits_KNC, labels_N)
    record = {
        "weights": found.weights,
        "val_nll": float(nll_N.mean()),
        "val_accuracy": float(right_N.mean()),
        "held_out_nll": float(held_out.nll_N.mean()),
        "held_out_accuracy": float(held_out.right_N.mean()),
        "evaluations": found.evaluations,
        "gap": found.gap,
    }
    if found.temperature is not None:
        record["temperature"] = found.temperature
    return record


def _scores(
    weighting: "Weighting", found: Found, logits_KNC: np.ndarray, labels_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Each sample's NLL and correctness under the ensemble, mixed as `weighting` says."""
    mixing: Mixing = getattr(weighting, "mixing", "probabilities")
    mixed_NC = mixed_log_probs(found.weights_K, logits_KNC, mixing, found.temperature or 1.0)
    return sample_scores(mixed_NC, labels_N)


def _mean_and_error(differences_N: np.ndarray) -> tuple[float, float]:
    """Mean, and its standard error over samples."""
    error = differences_N.std(ddof=1) / np.sqrt(len(differences_N))
    return float(differences_N.mean()), float(error)
