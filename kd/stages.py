"""THE STORY: one short function per stage, in the order in which DVC runs them.

    data -> teacher -> assistants@{name} -> weights -> student -> baselines@{name}
         -> exports@{format} -> report

Each stage reads what earlier ones wrote under artifacts/, and writes a folder of its own there;
only `report` opens the test split.
"""

import json
from collections.abc import Callable, Mapping

import torch

from kd import artifacts, manifest
from kd import report as reporting
from kd.data import Images, prepare
from kd.ensemble import Mixing
from kd.evaluate import predict
from kd.examine import examine, latencies, names_of
from kd.exporters import export_and_check
from kd.params import Params
from kd.roles import Role, learn, seed_of, try_models
from kd.tracking import Run
from kd.tracking.weights import log_weight_sets
from kd.weightings import (
    convergence_rows,
    path_rows,
    tried_rows,
    weight_metrics,
    weight_record,
)

DATA = artifacts.ROOT / "data"
REGISTERED_NAME = "kd-student"


def data(params: Params, name: str, run: Run) -> None:
    """Read the data set, split it, and keep it in a compact form."""
    section = params.data
    record = prepare(
        section.dataset,
        section.splits,
        image_size=section.image_size,
        channels=section.channels,
        seed=params.seed,
        folder=artifacts.folder("data"),
    )
    try_models([params.teacher, *params.assistants.values(), params.student], record)
    counts = {split: found["count"] for split, found in record["splits"].items()}
    print(", ".join(f"{split} {count}" for split, count in counts.items()))
    run.log_final({f"num_{split}": count for split, count in counts.items()})
    run.log_file(DATA / "data.json")


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
    """Distil the teacher into one middle-sized network."""
    section = params.assistants[name]
    role = Role(
        run_name=f"assistants/{name}",
        role="assistant",
        model=section.model,
        recipe=section.recipe,
        seed=seed_of(params.seed, f"assistants/{name}"),
        method=section.method,
        teachers={"teacher": 1.0},
    )
    learn(role, run)


def weights(params: Params, name: str, run: Run) -> None:
    """Find how much each assistant counts, on cached validation logits."""
    members = [manifest.load(artifacts.folder(f"assistants/{each}")) for each in params.assistants]
    val = Images.load(DATA, "val")
    logits_KNC = torch.stack([predict(module, val) for module, _ in members])
    folder = artifacts.folder("weights")
    names = tuple(params.assistants)
    sha256 = {each: m.sha256 for each, (_, m) in zip(names, members, strict=True)}
    artifacts.write_tensors(
        folder / "val_logits.safetensors",
        {"logits_KNC": logits_KNC, "labels_N": val.labels_N},
        {"members": json.dumps(sha256)},
    )
    study = artifacts.folder("runs") / "weights.study.log"
    given = (logits_KNC.numpy(), val.labels_N.numpy())
    found = params.weights.find(*given, names, seed_of(params.seed, "weights"), study)
    record = weight_record(params.weights, found, *given, seed_of(params.seed, "weights"))
    record |= {"sha256": sha256, "shrinkage": found.shrinkage, "warnings": list(found.warnings)}
    artifacts.write_json(folder / "weights.json", record)
    artifacts.write_json(folder / "metrics.json", weight_metrics(record))
    artifacts.write_csv(folder / "convergence.csv", convergence_rows(found))
    artifacts.write_csv(folder / "path.csv", path_rows(found))
    artifacts.write_csv(folder / "tried.csv", tried_rows(found))
    print("  ".join(f"{each} {weight:.3f}" for each, weight in found.weights.items()))
    for warning in found.warnings:
        print(f"warning: {warning}")
    log_weight_sets(run, folder, tags={}, study=study)


def student(params: Params, name: str, run: Run) -> None:
    """Distil the weighted ensemble of assistants into the small network, and register it."""
    record = artifacts.read_json(artifacts.ROOT / "weights/weights.json")
    mixing = record["weighting"].get("mixing", "probabilities")
    check_weighed(record["sha256"])
    learn(student_role(params, "student", of_assistants(record["weights"]), mixing), run)
    register(run)


def baselines(params: Params, name: str, run: Run) -> None:
    """Train the student again, alike in all but its teachers."""
    section = params.baselines[name]
    teachers = {"teacher": 1.0} if section.teachers == "teacher" else {}
    mixing: Mixing = "probabilities"
    if section.weighting is not None:
        path = artifacts.ROOT / "weights/val_logits.safetensors"
        tensors, metadata = artifacts.read_tensors(path)
        members = json.loads(metadata["members"])
        check_weighed(members)
        logits_KNC, labels_N = tensors["logits_KNC"].numpy(), tensors["labels_N"].numpy()
        seed = seed_of(params.seed, "weights")
        found = section.weighting.find(logits_KNC, labels_N, tuple(members), seed)
        teachers = of_assistants(found.weights)
        mixing = getattr(section.weighting, "mixing", mixing)
    learn(student_role(params, f"baselines/{name}", teachers, mixing), run)


def exports(params: Params, name: str, run: Run) -> None:
    """Write the student in one mobile format, if the file computes what the student computes."""
    module, described = manifest.load(artifacts.folder("student"))
    val = Images.load(DATA, "val")
    batches = (val.batch(indices) for indices in torch.arange(len(val)).split(256))
    folder = artifacts.folder(f"exports/{name}")
    exporter = params.exports[name]
    parity = export_and_check(
        exporter, module, val.batch(torch.arange(2)), batches, val.labels_N, folder
    )
    artifacts.write_json(folder / "parity.json", parity.record())
    print(f"{parity.file}: {parity.size_bytes:,} bytes, top-1 agreement {parity.top1_agreement}")
    run.log_final(
        {
            "val_accuracy": parity.val_accuracy,
            "size_mb": parity.size_bytes / 1e6,
            "parity_max_abs": parity.max_abs,
            "parity_top1_agreement": parity.top1_agreement,
        }
    )
    run.log_tags({"kd.student_sha256": described.sha256, "kd.export_sha256": parity.sha256})
    for path in (folder / parity.file, folder / "parity.json"):
        run.log_file(path)


def report(params: Params, name: str, run: Run) -> None:
    """Open the test split, once, and say what came of it all."""
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
"""In the order of the story.  A stage that DVC runs once per key is given the key as `name`."""


def tags(stage: str) -> dict[str, str]:
    """What tells the stage's tracking run from others."""
    roles = {"teacher": "teacher", "assistants": "assistant", "student": "student"}
    record = artifacts.read_json(DATA / "data.json") if stage != "data" else {}
    return {
        "kd.pipeline": REGISTERED_NAME,
        "kd.role": roles.get(stage, stage),
        "kd.data_hash": record.get("data_hash", ""),
    }


def of_assistants(weights_by_name: Mapping[str, float]) -> dict[str, float]:
    """The same weights by run name."""
    return {f"assistants/{each}": weight for each, weight in weights_by_name.items()}


def student_role(
    params: Params, run_name: str, teachers: dict[str, float], mixing: Mixing
) -> Role:
    """The student under these teachers; its seed is one for the student and all its baselines."""
    section = params.student
    return Role(
        run_name=run_name,
        role="student",
        model=section.model,
        recipe=section.recipe,
        seed=seed_of(params.seed, "student"),
        method=section.method,
        teachers=teachers,
        mixing=mixing,
    )


def check_weighed(sha256_by_name: Mapping[str, str]) -> None:
    """Refuse weights that were found for other assistants than those now here."""
    for name, sha256 in sha256_by_name.items():
        if manifest.read(artifacts.folder(f"assistants/{name}")).sha256 != sha256:
            raise artifacts.ArtifactError(
                f"the weights were found for another assistants/{name} than the one now here: "
                "run `dvc repro weights`"
            )


def register(run: Run) -> None:
    """Log the student as a model; its rank in the registry is decided on validation accuracy."""
    val = Images.load(DATA, "val")
    run.log_model(
        artifacts.folder("student"),
        registered_name=REGISTERED_NAME,
        val_accuracy=artifacts.read_json(artifacts.ROOT / "student/metrics.json")["val_accuracy"],
        val_hash=artifacts.read_json(DATA / "data.json")["splits"]["val"]["sha256"],
        example=val.pixels_NHWC[:2].numpy(),
    )
