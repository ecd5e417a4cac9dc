"""Test every network of the experiment on the test split, which is opened only here.

N samples, K members, C classes.
"""

from dataclasses import asdict

import torch
from torch import Tensor

from kd import artifacts, manifest, report
from kd.data import Images
from kd.evaluate import (
    agreement,
    confusion,
    correct,
    discordant,
    paired_difference,
    predict,
    reliability,
    scores,
)
from kd.exporters import latency
from kd.methods import mix
from kd.params import Params
from kd.report import UNIFORM, WEIGHTED, Paired, Test


def examine(params: Params) -> Test:
    """Test every network, and the two ensembles, on the same images."""
    test = Images.load(artifacts.DATA, "test")
    logits = {
        name: predict(manifest.load(artifacts.folder(name))[0], test) for name in run_names(params)
    }
    logits |= ensembles(logits)
    labels_N = test.labels_N
    right = {name: correct(logits_NC, labels_N) for name, logits_NC in logits.items()}
    constant_N = labels_N == labels_N.mode().values
    return Test(
        scores={
            name: row_metrics(each, labels_N, logits["teacher"]) for name, each in logits.items()
        },
        student_minus={
            name: paired(right["student"], other)
            for name, other in right.items()
            if name != "student"
        },
        ensemble_minus_teacher=paired(right[WEIGHTED], right["teacher"]),
        over_constant={name: paired(each, constant_N) for name, each in right.items()},
        labels_N=labels_N.tolist(),
        predicted_N=logits["student"].argmax(1).tolist(),
        confusion_CC=confusion(logits["student"], labels_N).tolist(),
        bins=reliability(logits["student"], labels_N),
    )


def run_names(params: Params) -> list[str]:
    """Every trained network of the experiment, in the order of the table."""
    assistants = [f"assistants/{name}" for name in params.assistants]
    return ["teacher", *assistants, "student", *(f"baselines/{b}" for b in params.baselines)]


def ensembles(logits: dict[str, Tensor]) -> dict[str, Tensor]:
    """Log-probs (N, C) of the uniform and the weighted ensemble of assistants."""
    record = artifacts.read_json(artifacts.ROOT / "weights/weights.json")
    logits_KNC = torch.stack([logits[f"assistants/{name}"] for name in record["members"]])
    mixing = record["weighting"].get("mixing", "probabilities")
    chosen_K = tuple(record["weights"].values())
    chosen = record["sets"]["chosen"].get("temperature", 1.0)
    uniform_K = (1 / len(chosen_K),) * len(chosen_K)
    return {
        UNIFORM: mix(logits_KNC, uniform_K, 1.0),
        WEIGHTED: mix(logits_KNC, chosen_K, chosen, mixing),
    }


def row_metrics(logits_NC: Tensor, labels_N: Tensor, teacher_NC: Tensor) -> dict[str, float]:
    """The test columns of a row of the table."""
    found = asdict(scores(logits_NC, labels_N)) | {"agreement": agreement(logits_NC, teacher_NC)}
    return {f"test_{name}": value for name, value in found.items()}


def paired(right_N: Tensor, other_N: Tensor) -> Paired:
    """How much more often the first is right on the same images."""
    difference, standard_error = paired_difference(right_N, other_N)
    gained, lost = discordant(right_N, other_N)
    return Paired(difference=difference, standard_error=standard_error, gained=gained, lost=lost)


def latencies(params: Params) -> dict[str, float]:
    """Median milliseconds for one image on one thread, measured in turns in a single run."""
    example = Images.load(artifacts.DATA, "test").batch(torch.tensor([0]))
    eager = {name: manifest.load(artifacts.folder(name))[0] for name in run_names(params)}
    files = {}
    for name, exporter in params.exports.items():
        if not exporter.runs_here:
            continue
        folder = artifacts.folder(f"exports/{name}")
        files[f"exports/{name}"] = exporter.load(folder / f"model{exporter.suffix}")
    measured = latency({**eager, **files}, example, seconds=params.report.latency_seconds)
    return {name: row["median_ms"] for name, row in measured.items()}


def names_of(params: Params) -> report.Names:
    """The names that the report needs."""
    return report.Names(
        assistants=list(params.assistants),
        baselines=list(params.baselines),
        exports=list(params.exports),
        class_names=artifacts.data_record()["class_names"],
    )
