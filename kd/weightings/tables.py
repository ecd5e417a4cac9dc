"""A search's history as tables, for `dvc plots` and figures; K members, G generations."""

from collections.abc import Mapping
from typing import Any

from kd.weightings.found import Found


def convergence_rows(found: Found) -> list[dict[str, float]]:
    """Best, median and worst value of the population by generation."""
    history = found.history
    columns = (history.evaluations_G, history.best_G, history.median_G, history.worst_G)
    return [
        {
            "generation": generation,
            "evaluations": int(evaluations),
            "best": float(best),
            "median": float(median),
            "worst": float(worst),
        }
        for generation, (evaluations, best, median, worst) in enumerate(zip(*columns, strict=True))
    ]


def path_rows(found: Found) -> list[dict[str, float]]:
    """The best weights so far by generation, one column per member."""
    return [
        {"generation": generation, **dict(zip(found.names, weights_K.tolist(), strict=True))}
        for generation, weights_K in enumerate(found.history.weights_GK)
    ]


def tried_rows(found: Found) -> list[dict[str, float]]:
    """Every candidate of the search in order: its weights, and the objective's value."""
    history = found.history
    return [
        {**dict(zip(found.names, weights_K.tolist(), strict=True)), "value": float(value)}
        for weights_K, value in zip(history.tried_MK, history.values_M, strict=True)
    ]


def weight_metrics(record: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of weights.json for comparing experiments, all of them held out."""
    return {
        "held_out_nll": {name: found["held_out_nll"] for name, found in record["sets"].items()},
        "held_out_accuracy": {
            name: found["held_out_accuracy"] for name, found in record["sets"].items()
        },
        "gain": record["gain"],
        "weights": record["weights"],
    }
