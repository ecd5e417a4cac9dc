"""learn(): train one network, from its section of params.yaml to its folder of artifacts.

All roles take the same path: a teacher has no teachers, an assistant an ensemble of one, and a
student an ensemble of many.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kd import artifacts, launch, manifest
from kd.checkpoint import DiskCheckpoint
from kd.component import own_sources
from kd.data import Images, key
from kd.ensemble import Ensemble
from kd.evaluate import agreement, predict, scores
from kd.machine import machine, remembered
from kd.manifest import Manifest, Origin
from kd.methods import Learner, Method, Mixing, surrounded
from kd.models import Model, build_model, count
from kd.progress import Progress
from kd.recipe import Recipe
from kd.stopping import asked_to_stop
from kd.tables import DiskTables
from kd.tracking import Run
from kd.train import Epoch, fit, ranks, steps_in_epoch
from kd.train.device import prepare
from kd.train.speed import CHOICES, fastest


@dataclass(frozen=True, kw_only=True)
class Role:
    """Who learns what, and from whom."""

    run_name: str
    """teacher, assistants/large, student, baselines/uniform."""
    role: str
    """teacher, assistant or student."""
    model: Model
    recipe: Recipe
    seed: int
    """Decides the initial weights and the order of images; a student and its baselines share it,
    so that they differ only in how they are taught."""
    method: Method | None = None
    """How it learns; None: from labels."""
    teachers: Mapping[str, float] = field(default_factory=dict)
    """Weight of each teacher by run name; empty if it has none."""
    mixing: Mixing = "probabilities"
    """Whether the teachers' probabilities or logits are averaged."""
    peers: Mapping[str, Model] = field(default_factory=dict)
    """Networks that train along with it."""
    generations: int = 1
    """How often it is trained; each further generation has the previous one as only teacher."""

    def is_taught(self) -> bool:
        """Whether its method is used: it needs no teachers, or has them."""
        needs = self.method.resolved().needs if self.method else "teachers"
        return bool(self.teachers) or self.generations > 1 or needs != "teachers"


def learn(role: Role, run: Run) -> None:
    """Train, evaluate on the validation split, and write the folder of `role`."""
    device = prepare(role.recipe)
    record = artifacts.data_record()
    role = replace(role, recipe=settled(role, record, device))
    with ranks.group(device):
        members, origins = load_teachers(role, record["data_hash"])
        described = describe(role, record, origins, device)
        with asked_to_stop() as stop:
            module, history = train(role, described, ensemble_of(role, members), 0, run, stop)
            for generation in range(1, role.generations):
                last = Ensemble((module,), (1.0,))
                module, history = train(role, described, last, generation, run, stop)
        if launch.is_first():
            keep(role, described, module, history, run)
            for generation in range(role.generations):
                checkpoint_of(described, generation).remove()


def settled(role: Role, record: Mapping[str, Any], device: str) -> Recipe:
    """The role's recipe with its `auto` settings resolved for this machine.

    They are measured once and cached, so that repeated runs are bit-identical.
    """
    recipe = role.recipe
    if "auto" not in {getattr(recipe, name) for name in CHOICES}:
        return recipe
    images, steps = training_images(role, device, learns_from_pool=True)
    num_classes = len(record["class_names"])
    question = {
        "model": asdict(role.model),
        "image": images.image_shape,
        "recipe": asdict(recipe),
        "steps": steps,
        "device": device,
        **machine(),
    }

    def ask() -> dict[str, Any]:
        shape = {"channels": record["channels"], "image_size": record["image_size"]}
        model = build_model(role.model, **shape, num_classes=num_classes)
        total = recipe.epochs * steps
        share = replace(recipe, batch_size=recipe.batch_size // recipe.devices, devices=1)
        return {"answer": fastest(model, images, share, num_classes=num_classes, num_steps=total)}

    answer = remembered("speed", question, ask)["answer"]
    shown = ", ".join(f"{name} {value}" for name, value in answer.items())
    print(f"{role.run_name}: {shown}, as measured on this machine")
    return replace(recipe, **answer)


def keep(
    role: Role, described: Manifest, module: nn.Module, history: Sequence[Epoch], run: Run
) -> None:
    """Save the trained network and its metrics, and log them."""
    folder = artifacts.folder(role.run_name)
    written = manifest.save(folder, module.cpu(), described)
    artifacts.write_curves(folder / "curves.csv", history)
    metrics = measure(module, written, history)
    artifacts.write_json(folder / "metrics.json", metrics)
    run.log_final(final_metrics(metrics) | teacher_weights(role))
    for name in ("manifest.json", "metrics.json", "curves.csv"):
        run.log_file(folder / name)
    run.log_tags({"kd.sha256": written.sha256})


def train(
    role: Role,
    described: Manifest,
    ensemble: Ensemble | None,
    generation: int,
    run: Run,
    stop: Callable[[], bool],
) -> tuple[nn.Module, list[Epoch]]:
    """Train one generation of a role; returns the network and its epochs."""
    seed = role.seed if generation == 0 else key("generation", role.seed, generation)
    torch.manual_seed(key("weights", seed))
    val = Images.load(artifacts.DATA, "val", device=described.device)
    before = generation * role.recipe.epochs

    def tell(history: Sequence[Epoch]) -> None:
        run.log_curve({before + epoch.number: epoch_metrics(epoch) for epoch in history})

    return taught(
        described.build(),
        replace(role, seed=seed),
        described,
        ensemble,
        checkpoint_of(described, generation),
        stop,
        validate=lambda model: progress_metrics(model, val),
        on_epoch=lambda epoch: run.log_epoch(before + epoch.number, epoch_metrics(epoch)),
        on_resume=tell,
    )


def taught(
    network: nn.Module,
    role: Role,
    described: Manifest,
    ensemble: Ensemble | None,
    checkpoint: DiskCheckpoint,
    stop: Callable[[], bool],
    *,
    validate: Callable[[nn.Module], Mapping[str, float]] = lambda model: {},
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    on_resume: Callable[[list[Epoch]], None] = lambda history: None,
) -> tuple[nn.Module, list[Epoch]]:
    """Train `network` by its role; returns it, without its learner or peers, and its epochs."""
    method = role.method.resolved() if role.method else None
    # Having an ensemble is not enough: methods with peers ignore that of a second generation.
    listens = ensemble is not None and method is not None and method.needs == "teachers"
    learns_from_pool = listens or (method is not None and method.uses_pool)
    images, epoch_steps = training_images(role, described.device, learns_from_pool)
    learner = network
    if method is not None:
        peers = {name: described.build(model) for name, model in described.peers.items()}
        members = ensemble.described() if ensemble else None
        learner = surrounded(network, method, peers, members)
    size = sum(t.numel() * t.element_size() for t in learner.state_dict().values())
    artifacts.check_space(Path.cwd(), 8 * size)  # weights, mean and two optimiser states, twice
    progress = Progress(role.run_name, role.recipe.epochs, epoch_steps)

    def tell(epoch: Epoch) -> None:
        progress.epoch(epoch)
        on_epoch(epoch)

    with progress:
        trained, history = fit(
            learner,
            images,
            role.recipe,
            seed=role.seed,
            num_classes=described.num_classes,
            epoch_steps=epoch_steps,
            method=method,
            ensemble=ensemble,
            validate=validate,
            on_step=progress.step,
            on_epoch=tell,
            on_resume=on_resume,
            checkpoint=checkpoint,
            tables=DiskTables(),
            stop=stop,
        )
    return trained.student if isinstance(trained, Learner) else trained, history


def checkpoint_of(described: Manifest, generation: int) -> DiskCheckpoint:
    """The checkpoint of a generation in training."""
    return DiskCheckpoint(described.name, [asdict(described), generation])


def seed_of(seed: int, run_name: str) -> int:
    """A network's own seed, from the experiment's: equal seeds would make equal assistants."""
    return key(run_name, seed)


def describe(
    role: Role, record: Mapping[str, Any], teachers: tuple[Origin, ...], device: str
) -> Manifest:
    """The manifest: everything that determines the result; `record` describes the data."""
    return Manifest(
        name=role.run_name,
        role=role.role,
        model=asdict(role.model),
        channels=record["channels"],
        image_size=record["image_size"],
        class_names=tuple(record["class_names"]),
        mean=tuple(record["mean"]),
        std=tuple(record["std"]),
        data_hash=record["data_hash"],
        teachers=teachers,
        weights_K=tuple(role.teachers.values()),
        mixing=role.mixing,
        method=asdict(role.method) if role.method and role.is_taught() else None,
        peers={name: asdict(model) for name, model in role.peers.items()},
        generations=role.generations,
        recipe=asdict(role.recipe),
        seed=role.seed,
        code=artifacts.code_digest(own=own_sources(asdict(role))),
        device=device,
    )


def training_images(role: Role, device: str, learns_from_pool: bool) -> tuple[Images, int]:
    """The training images, and the steps of an epoch: one pass over train and pool.

    A role that cannot learn from the pool sees only the labelled images, correspondingly often.
    """
    load = partial(Images.load, artifacts.DATA, device=device, augment=role.recipe.augment)
    everything = load(("train", "pool"))
    steps = steps_in_epoch(len(everything), role.recipe.batch_size)
    return everything if learns_from_pool else load("train"), steps


def load_teachers(role: Role, data_hash: str) -> tuple[tuple[nn.Module, ...], tuple[Origin, ...]]:
    """The role's teachers and their origins; refused if data or teachers of theirs changed."""
    loaded = [manifest.load(artifacts.folder(name)) for name in role.teachers]
    present = {m.name: m.sha256 for _, m in loaded}
    for above in {origin.name for _, m in loaded for origin in m.teachers}:
        present[above] = manifest.read(artifacts.folder(above)).sha256
    manifest.check_lineage([m for _, m in loaded], present, data_hash)
    origins = tuple(Origin(name=m.name, sha256=m.sha256) for _, m in loaded)
    return tuple(module for module, _ in loaded), origins


def ensemble_of(role: Role, members: tuple[nn.Module, ...]) -> Ensemble | None:
    """The role's teachers with their weights; None if it has none."""
    names = tuple(name.removeprefix("assistants/") for name in role.teachers)
    weights_K = tuple(role.teachers.values())
    return Ensemble(members, weights_K, role.mixing, names) if members else None


def progress_metrics(model: nn.Module, val: Images) -> dict[str, float]:
    """Validation metrics during training."""
    found = scores(predict(model, val), val.labels_N)
    return {"accuracy": found.accuracy, "nll": found.nll}


def measure(module: nn.Module, described: Manifest, history: Sequence[Epoch]) -> dict[str, float]:
    """A trained network's metrics.json: validation, agreement with the teacher, size, budget.

    Measured on the device it was trained on, which this process holds anyway.
    """
    val = Images.load(artifacts.DATA, "val", device=described.device)
    logits_NC = predict(module.to(described.device), val)
    found = asdict(scores(logits_NC, val.labels_N))
    metrics: dict[str, float] = {f"val_{name}": value for name, value in found.items()}
    if described.role != "teacher":
        teacher, _ = manifest.load(artifacts.folder("teacher"))
        teacher = teacher.to(described.device)
        metrics["val_agreement"] = agreement(logits_NC, predict(teacher, val))
    counts = count(module, val.image_shape)
    weights = artifacts.folder(described.name) / "model.safetensors"
    return metrics | {
        "parameters": counts.parameters,
        "multiply_adds": counts.multiply_adds,
        "size_bytes": weights.stat().st_size,
        "epochs": len(history),
        "samples_seen": described.generations * history[-1].step * described.recipe["batch_size"],
    }


def final_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics for comparing tracked runs; sizes in millions."""
    return {
        **{name: value for name, value in metrics.items() if name.startswith("val_")},
        "params_m": metrics["parameters"] / 1e6,
        "multiply_adds_m": metrics["multiply_adds"] / 1e6,
        "size_mb": metrics["size_bytes"] / 1e6,
        "samples_seen": metrics["samples_seen"],
    }


def teacher_weights(role: Role) -> dict[str, float]:
    """Each teacher's weight, named as in the runs of weight sets; empty if it had just one."""
    if len(role.teachers) < 2:
        return {}
    return {
        f"weight/{name.removeprefix('assistants/')}": weight
        for name, weight in role.teachers.items()
    }


def epoch_metrics(epoch: Epoch) -> dict[str, float]:
    """The metrics of an epoch for the tracking run."""
    return {
        "train_loss": epoch.train_loss,
        "lr": epoch.lr,
        "images_per_second": epoch.images_per_second,
        **{f"val_{name}": value for name, value in epoch.validation.items()},
    }
