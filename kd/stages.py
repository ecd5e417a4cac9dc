"""THE STORY: one short function per stage, in the order in which DVC runs them.

    data -> teacher -> assistants@{name} -> weights -> student -> baselines@{name}
         -> exports@{format} -> report

Each stage reads what earlier ones wrote under artifacts/, and writes a folder of its own there;
only `report` opens the test split.

K members, N images, C classes.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from kd import artifacts, bench, bundle, manifest, promotion
from kd import report as reporting
from kd.cast import assistant_role, baseline_role, taught_student
from kd.component import require
from kd.data import Images, Raw, copy_warnings, dark_warnings, prepare
from kd.evaluate import predict
from kd.examine import examine, latencies, names_of
from kd.exporters import export_and_check
from kd.packing import student_to_export, try_export
from kd.params import Params
from kd.qat import when_called_for
from kd.roles import Role, learn, seed_of
from kd.tracking import Run, TrackingError
from kd.tracking.weights import log_weight_sets
from kd.trial import try_learners
from kd.weightings import (
    Weighting,
    convergence_rows,
    path_rows,
    tried_rows,
    weight_metrics,
    weight_record,
)

LEAST_VAL = 7
"""Validation images: of five folds, any four must be enough for five folds again."""


def data(params: Params, name: str, run: Run) -> None:
    """Read the data set, split it, and store it compactly; try out all that depends on it."""
    for exporter in params.exports.values():
        exporter.check()
    raw = read_data(params)
    try_export(params.student.model, **shape_of(params, raw))
    prepare_data(params, raw, run)


def read_data(params: Params) -> Raw:
    """Read the data set, and try out all learners on its shape, and the splits."""
    raw, splits = params.data.dataset.read(), params.data.splits
    try_learners(params.learners(), **shape_of(params, raw))
    num_val = len(splits.assign(raw, params.seed)["val"])
    enough = f"enough for {LEAST_VAL} images, which the weights' cross-validation needs"
    require(num_val >= LEAST_VAL, "data.splits.val", splits.val, enough)
    return raw


def shape_of(params: Params, raw: Raw) -> dict[str, int]:
    """What a model must know about the images."""
    section = params.data
    sizes = {"channels": section.channels, "image_size": section.image_size}
    return {**sizes, "num_classes": len(raw.class_names)}


def prepare_data(params: Params, raw: Raw, run: Run) -> None:
    """Split the data set that was read, and store it compactly."""
    section = params.data
    record = prepare(
        section.dataset,
        section.splits,
        image_size=section.image_size,
        channels=section.channels,
        seed=params.seed,
        folder=artifacts.folder("data"),
        raw=raw,
    )
    counts = {split: found["count"] for split, found in record["splits"].items()}
    print(", ".join(f"{split} {count}" for split, count in counts.items()))
    for warning in (*copy_warnings(artifacts.DATA, raw), *dark_warnings(artifacts.DATA, raw)):
        print(warning)
    run.log_final({f"num_{split}": count for split, count in counts.items()})
    run.log_tags({"kd.data_hash": record["data_hash"]})
    run.log_file(artifacts.DATA / "data.json")


def teacher(params: Params, name: str, run: Run) -> None:
    """Train the large network on labels."""
    section = params.teacher
    role = Role(
        run_name="teacher",
        role="teacher",
        model=section.model,
        recipe=section.recipe,
        seed=seed_of(params.seed, "teacher"),
    )
    learn(role, run)


def assistants(params: Params, name: str, run: Run) -> None:
    """Distil the networks before it in its chain into one middle-sized network."""
    learn(assistant_role(params, name), run)


def weights(params: Params, name: str, run: Run) -> None:
    """Find each assistant's weight, on cached validation logits."""
    folder, seed = artifacts.folder("weights"), seed_of(params.seed, "weights")
    sha256, logits_KNC, labels_N = member_logits(params, folder)
    begun = study_begun(params.weights, folder, seed)
    found = params.weights.find(logits_KNC, labels_N, tuple(params.assistants), seed, begun)
    record = weight_record(params.weights, found, logits_KNC, labels_N, seed)
    record |= {"sha256": sha256, "searched": found.searched, "shrinkage": found.shrinkage}
    record |= {"warnings": list(found.warnings)}
    artifacts.write_json(folder / "weights.json", record)
    artifacts.write_json(folder / "metrics.json", weight_metrics(record))
    artifacts.write_csv(folder / "convergence.csv", convergence_rows(found))
    artifacts.write_csv(folder / "path.csv", path_rows(found))
    artifacts.write_csv(folder / "tried.csv", tried_rows(found))
    print("  ".join(f"{each} {weight:.3f}" for each, weight in found.weights.items()))
    for warning in found.warnings:
        print(f"warning: {warning}")
    log_weight_sets(run, folder, study_ended(begun))


def member_logits(params: Params, folder: Path) -> tuple[dict[str, str], np.ndarray, np.ndarray]:
    """Each assistant's SHA-256 and validation logits (K, N, C), and labels (N,); also saved."""
    loaded = {
        name: manifest.load(artifacts.folder(f"assistants/{name}")) for name in params.assistants
    }
    sha256 = {name: described.sha256 for name, (_, described) in loaded.items()}
    val = Images.load(artifacts.DATA, "val")
    logits_KNC = torch.stack([predict(module, val) for module, _ in loaded.values()])
    artifacts.write_tensors(
        folder / "val_logits.safetensors",
        {"logits_KNC": logits_KNC, "labels_N": val.labels_N},
        {"members": json.dumps(sha256)},
    )
    return sha256, logits_KNC.numpy(), val.labels_N.numpy()


def study_begun(weighting: Weighting, folder: Path, seed: int) -> Path:
    """The running search's study: outside DVC's outputs, so that a killed search resumes."""
    logits = artifacts.sha256(folder / "val_logits.safetensors")
    inputs = [logits, asdict(weighting), seed, artifacts.code_digest(("weightings",))]
    path = artifacts.state_path("weights", inputs, ".log")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def study_ended(begun: Path) -> Path | None:
    """Move the search's study to where DVC keeps it; None if there was no search."""
    study = artifacts.folder("runs") / "weights.study.log"
    with artifacts.atomic(study) as temporary:  # empty if there was no search: DVC expects a file
        temporary.write_bytes(begun.read_bytes() if begun.exists() else b"")
    begun.unlink(missing_ok=True)
    return study if study.stat().st_size else None


def student(params: Params, name: str, run: Run) -> None:
    """Distil the weighted ensemble of assistants into the small network; let it compete."""
    learn(taught_student(params), run)
    enter(run)


def baselines(params: Params, name: str, run: Run) -> None:
    """Train the student again with other teachers or another method."""
    learn(baseline_role(params, name), run)


def exports(params: Params, name: str, run: Run) -> None:
    """Export the student to one mobile format, if the file's outputs match the student's."""
    exporter = params.exports[name]
    trained, described = student_to_export(exporter)
    val = Images.load(artifacts.DATA, "val")
    run_name = f"exports/{name}"
    folder = artifacts.folder(run_name)
    bundle.clear(folder)
    called_for = when_called_for(exporter.int8, trained, taught_student(params), run_name)
    parity = export_and_check(
        exporter, trained, val.pixels_NHWC, val.labels_N, folder, fine_tune=called_for
    )
    bench.record(folder / parity.file, trained.served(exporter.picture_input))
    bundle.write(folder, parity.record(), described, artifacts.data_record())
    print(f"{parity.file}: {parity.size_bytes:,} bytes, top-1 agreement {parity.top1_agreement}")
    run.log_final(promotion.log_export(run, folder))
    run.log_tags({"kd.student_sha256": described.sha256, "kd.export_sha256": parity.sha256})


def report(params: Params, name: str, run: Run) -> None:
    """Open the test split, once, and report the results."""
    names, test = names_of(params), examine(params)
    record = reporting.build(artifacts.ROOT, names, test)
    folder = artifacts.folder("report")
    reporting.write(folder, artifacts.ROOT, record, names, test, latencies(params))
    student = next(row for row in record["rows"] if row["name"] == "student")
    run.log_final({key: value for key, value in student.items() if isinstance(value, float)})
    for path in sorted(folder.rglob("*.*")):
        run.log_file(path, "figures" if path.suffix == ".png" else "")


STAGES: dict[str, Callable[[Params, str, Run], None]] = {
    "data": data,
    "teacher": teacher,
    "assistants": assistants,
    "weights": weights,
    "student": student,
    "baselines": baselines,
    "exports": exports,
    "report": report,
}
"""In pipeline order.  A stage that DVC runs once per key is given the key as `name`."""


def tags(stage: str) -> dict[str, str]:
    """The tags of the stage's tracking run."""
    roles = {"teacher": "teacher", "assistants": "assistant", "student": "student"}
    record = artifacts.data_record() if stage != "data" else {}
    return {
        "kd.pipeline": promotion.REGISTERED_NAME,
        "kd.role": roles.get(stage, stage),
        "kd.data_hash": record.get("data_hash", ""),
    }


def enter(run: Run) -> None:
    """Let the trained student compete for champion; the stage does not fail if MLflow does."""
    if run.id is None:
        return
    try:
        print(promotion.promote(run))
    except TrackingError as error:
        print(f"warning: not registered: {error}; `kd promote` does it later")
