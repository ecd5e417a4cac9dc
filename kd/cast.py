"""Turn params.yaml and the ensemble weights that were found into the roles to train.

K members, N images, C classes.
"""

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from kd import artifacts, manifest
from kd.data import Images
from kd.evaluate import predict
from kd.methods import Method, Mixing
from kd.params import BaselineParams, Params, StudentParams, teachers_named
from kd.roles import Role, seed_of


def assistant_role(params: Params, name: str) -> Role:
    """An assistant, taught by the network above it or, if dense, by its chain."""
    section = params.assistants[name]
    chain = params.chain(name)
    above = chain if section.dense else chain[:1]
    return Role(
        run_name=f"assistants/{name}",
        role="assistant",
        model=section.model,
        recipe=section.recipe,
        seed=seed_of(params.seed, f"assistants/{name}"),
        method=section.method,
        teachers=dict.fromkeys(above, 1 / len(above)) if listens(section.method) else {},
        peers=section.peers,
        generations=section.generations,
    )


def baseline_role(params: Params, name: str) -> Role:
    """The student with other teachers, or with another method."""
    section = params.baselines[name]
    names = teachers_named(section.teachers, tuple(params.assistants))
    weights_by_name = dict.fromkeys(names, 1 / max(1, len(names)))
    mixing: Mixing = "probabilities"
    if section.weighting is not None:
        logits_KNC, labels_N = val_logits(names)
        seed = seed_of(params.seed, "weights")
        found = section.weighting.find(logits_KNC.numpy(), labels_N.numpy(), names, seed)
        weights_by_name = found.weights
        mixing = getattr(section.weighting, "mixing", mixing)
    teachers = by_run_name(weights_by_name)
    return student_role(params, f"baselines/{name}", section, teachers, mixing)


def taught_student(params: Params) -> Role:
    """The student, taught by the weighted ensemble and the teacher's own share."""
    record = artifacts.read_json(artifacts.ROOT / "weights/weights.json")
    mixing = record["weighting"].get("mixing", "probabilities")
    check_weighed(record["sha256"])
    share = params.student.teacher_share
    weighed = {name: (1 - share) * weight for name, weight in record["weights"].items()}
    teachers = by_run_name(weighed | ({"teacher": share} if share else {}))
    return student_role(params, "student", params.student, teachers, mixing)


def student_role(
    params: Params,
    run_name: str,
    section: StudentParams | BaselineParams,
    teachers: dict[str, float],
    mixing: Mixing,
) -> Role:
    """The student with these teachers; it and all its baselines share one seed."""
    method = section.method or params.student.method
    return Role(
        run_name=run_name,
        role="student",
        model=params.student.model,
        recipe=params.student.recipe,
        seed=seed_of(params.seed, "student"),
        method=method,
        teachers=teachers if listens(method) else {},
        mixing=mixing,
        peers=section.peers if section.method else params.student.peers,
        generations=section.generations,
    )


def listens(method: Method) -> bool:
    """Whether a method has teachers."""
    return method.resolved().needs == "teachers"


def by_run_name(weights_by_name: Mapping[str, float]) -> dict[str, float]:
    """The same weights, keyed by run name instead of name."""
    return {
        each if each == "teacher" else f"assistants/{each}": weight
        for each, weight in weights_by_name.items()
    }


def val_logits(names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Validation logits (K, N, C), the assistants' as the stage `weights` kept them; labels.

    Raises:
        ArtifactError: an assistant was trained again since then.
    """
    tensors, metadata = artifacts.read_tensors(artifacts.ROOT / "weights/val_logits.safetensors")
    members = json.loads(metadata["members"])
    check_weighed(members)
    logits = dict(zip(members, tensors["logits_KNC"], strict=True))
    if "teacher" in names:
        logits["teacher"] = predict(
            manifest.load(artifacts.folder("teacher"))[0],
            Images.load(artifacts.DATA, "val"),
        )
    return torch.stack([logits[name] for name in names]), tensors["labels_N"]


def check_weighed(sha256_by_name: Mapping[str, str]) -> None:
    """Refuse weights that were found for other assistants than the current ones."""
    for name, sha256 in sha256_by_name.items():
        if manifest.read(artifacts.folder(f"assistants/{name}")).sha256 != sha256:
            raise artifacts.ArtifactError(
                f"the weights were found for another assistants/{name} than the one now here: "
                "run `dvc repro weights`"
            )
