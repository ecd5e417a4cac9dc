"""Tracks the weights stage: a child run for each weight set, the search as curves and figures.

Metrics with a slash in their name get a section of their own on MLflow's pages.
Reads only what the stage wrote to artifacts/weights, and the study's file.
"""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path

from kd import figures
from kd.tracking import Run, run

# K members, N samples, C classes


def log_weight_sets(parent: Run, folder: Path, study: Path | None) -> None:
    """Log the search to `parent`, and each weight set as the child run weights/<set>.

    Args:
        parent: The weights stage's own run.
        folder: The stage's output: weights.json, val_logits.safetensors, convergence.csv,
            path.csv and tried.csv.
        study: The Optuna study's file, uploaded to the run so that optuna-dashboard can open it;
            None if there was no search.
    """
    record = json.loads((folder / "weights.json").read_text())
    parent.log_figure(figures.weights(record), "weights")
    for name in ("weights.json", "convergence.csv", "path.csv", "tried.csv"):
        parent.log_file(folder / name)
    _log_search(parent, record, folder)
    parent.log_final(_finals(record["sets"]["chosen"]) | _gains(record["gain"]))
    if study is not None:
        parent.log_file(study, "study")
        parent.log_tags({"kd.optuna_dashboard": f"optuna-dashboard {shlex.quote(str(study))}"})
    for name, found in record["sets"].items():
        weighting = record["weighting"] if name == "chosen" else {"kind": name}
        params = {"weighting": weighting, "num_val": record["num_val"]}
        enabled = parent.id is not None
        with run(
            "weights", name, params=params, tags=parent.tags, enabled=enabled, parent=parent.id
        ) as each:
            each.log_final(_finals(found))
            each.log_figure(figures.weights({**record, "sets": {name: found}}), "weights")


def _log_search(parent: Run, record: Mapping[str, object], folder: Path) -> None:
    """Log the search by generation: convergence, best weights; for K = 3 a map of the simplex."""
    convergence = figures.read_rows(folder / "convergence.csv")
    path = figures.read_rows(folder / "path.csv")
    parent.log_curve(
        {
            int(row["generation"]): {f"search/{k}": row[k] for k in ("best", "median", "worst")}
            for row in convergence
        }
    )
    parent.log_curve(
        {
            int(row["generation"]): {f"weight/{k}": w for k, w in row.items() if k != "generation"}
            for row in path
        }
    )
    parent.log_figure(figures.convergence(convergence), "convergence")
    parent.log_figure(figures.weights_path(path), "weights_path")
    members = record["members"]
    assert isinstance(members, list)
    if len(members) == 3:
        from safetensors.numpy import load_file

        cached = load_file(folder / "val_logits.safetensors")
        given = (cached["logits_KNC"], cached["labels_N"], members)
        tried = figures.read_rows(folder / "tried.csv")
        parent.log_figure(figures.simplex_map(*given, path, tried), "simplex")


def _finals(found: Mapping[str, object]) -> dict[str, float]:
    """A weight set's metrics, under the names that all runs share where possible."""
    weights = found["weights"]
    assert isinstance(weights, dict)
    numbers = {key: float(each) for key, each in found.items() if isinstance(each, int | float)}
    return {**{f"weight/{name}": float(w) for name, w in weights.items()}, **numbers}


def _gains(gain: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Held-out gains and their standard errors, flattened: gain/over_uniform.nll."""
    return {
        f"gain/{over}.{key}": float(value)
        for over, row in gain.items()
        for key, value in row.items()
    }
