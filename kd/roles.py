"""learn(): one network's training, from its section of params.yaml to its folder.

The role decides nothing here: a teacher is taught by nobody, an assistant by an ensemble of
one, a student by an ensemble of many, and all of them go the same way.
"""

import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from kd import artifacts, manifest
from kd.artifacts import ArtifactError
from kd.component import ConfigError
from kd.data import Images
from kd.ensemble import Ensemble, Mixing
from kd.evaluate import agreement, predict, scores
from kd.manifest import Manifest, Origin
from kd.methods import Method
from kd.models import Model, build_model, count
from kd.recipe import Recipe
from kd.tracking import Run
from kd.train import Epoch, fit, key, steps_in_epoch

DATA = "data"


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
    """Decides the initial weights and the order of images; a student's and its baselines' are
    the same, so that they differ in their teachers alone."""
    method: Method | None = None
    """How it learns from its teachers; None where it has none."""
    teachers: Mapping[str, float] = field(default_factory=dict)
    """Weight of each teacher by run name; empty: labels alone."""
    mixing: Mixing = "probabilities"
    """What of the teachers is averaged."""


def learn(role: Role, run: Run) -> None:
    """Train, evaluate on the validation split, and write the folder of `role`."""
    record = artifacts.read_json(artifacts.folder(DATA) / "data.json")
    device = prepare_device(role.recipe)
    images, epoch_steps = training_images(role, device)
    val = Images.load(artifacts.folder(DATA), "val", device=device)
    members, origins = load_teachers(role, record["data_hash"])
    described = describe(role, record, origins, device)
    torch.manual_seed(key("weights", role.seed))
    module = described.build()
    check_disk(module)
    checkpoint = artifacts.DiskCheckpoint(role.run_name, asdict(described))
    module, history = fit(
        module,
        images,
        role.recipe,
        seed=role.seed,
        num_classes=described.num_classes,
        epoch_steps=epoch_steps,
        method=role.method,
        ensemble=Ensemble(members, described.weights_K, role.mixing) if members else None,
        validate=lambda model: progress_figures(model, val),
        on_epoch=Progress(role, run),
        checkpoint=checkpoint,
    )
    folder = artifacts.folder(role.run_name)
    written = manifest.save(folder, module.cpu(), described)
    artifacts.write_curves(folder / "curves.csv", history)
    metrics = measure(module, written, history)
    artifacts.write_json(folder / "metrics.json", metrics)
    checkpoint.remove()
    run.log_final(final_figures(metrics))
    for name in ("manifest.json", "metrics.json", "curves.csv"):
        run.log_file(folder / name)
    run.log_tags({"kd.sha256": written.sha256})


def seed_of(seed: int, run_name: str) -> int:
    """The experiment's seed made different for each network: equal seeds make equal assistants."""
    return key(run_name, seed)


class Section(Protocol):
    """A section of params.yaml that has a model."""

    @property
    def model(self) -> Model: ...  # noqa: D102


def try_models(sections: Iterable[Section], record: Mapping[str, Any]) -> None:
    """Build every model once for these data, so that a bad one is found before any training.

    Raises:
        ConfigError: a model cannot be built, or does not turn these images into logits.
    """
    for section in sections:
        build_model(
            section.model,
            channels=record["channels"],
            image_size=record["image_size"],
            num_classes=len(record["class_names"]),
        )


def describe(
    role: Role, record: Mapping[str, Any], teachers: tuple[Origin, ...], device: str
) -> Manifest:
    """All that decides what the role learns; `record` is the data's."""
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
        method=asdict(role.method) if role.method and role.teachers else None,
        recipe=asdict(role.recipe),
        seed=role.seed,
        code=artifacts.code_digest(),
        device=device,
    )


def prepare_device(recipe: Recipe) -> str:
    """Set threads and determinism for this process; where to train, "cpu" or "cuda"."""
    torch.set_num_threads(recipe.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    has_gpu = torch.cuda.is_available()
    if recipe.device == "cuda" and not has_gpu:
        raise ConfigError("recipe.device is 'cuda', but there is no GPU here: set it to auto")
    return "cuda" if has_gpu and recipe.device != "cpu" else "cpu"


def training_images(role: Role, device: str) -> tuple[Images, int]:
    """What the role learns from, and the steps of an epoch: one pass over train and pool.

    Without teachers the pool says nothing, so only labelled images are shown, the more often.
    """
    data, augment = artifacts.folder(DATA), role.recipe.augment
    everything = Images.load(data, ("train", "pool"), device=device, augment=augment)
    steps = steps_in_epoch(len(everything), role.recipe.batch_size)
    if role.teachers:
        return everything, steps
    return Images.load(data, "train", device=device, augment=augment), steps


def load_teachers(role: Role, data_hash: str) -> tuple[tuple[nn.Module, ...], tuple[Origin, ...]]:
    """The role's teachers, and where they come from; refused where their own origins are gone."""
    loaded = [manifest.load(artifacts.folder(name)) for name in role.teachers]
    present = {m.name: m.sha256 for _, m in loaded}
    if role.role == "student" and loaded:
        teacher = manifest.read(artifacts.folder("teacher"))
        present[teacher.name] = teacher.sha256
    manifest.check_lineage([m for _, m in loaded], present, data_hash)
    origins = tuple(Origin(name=m.name, sha256=m.sha256) for _, m in loaded)
    return tuple(module for module, _ in loaded), origins


def progress_figures(model: nn.Module, val: Images) -> dict[str, float]:
    """What is looked at on the validation split while training."""
    found = scores(predict(model, val), val.labels_N)
    return {"accuracy": found.accuracy, "nll": found.nll}


def measure(module: nn.Module, described: Manifest, history: Sequence[Epoch]) -> dict[str, float]:
    """A trained network's metrics.json: validation, agreement with the teacher, size, budget."""
    val = Images.load(artifacts.folder(DATA), "val")
    logits_NC = predict(module, val)
    found = scores(logits_NC, val.labels_N)
    figures: dict[str, float] = {
        "val_accuracy": found.accuracy,
        "val_nll": found.nll,
        "val_ece": found.ece,
        "val_worst_class_accuracy": found.worst_class_accuracy,
    }
    if described.role != "teacher":
        teacher, _ = manifest.load(artifacts.folder("teacher"))
        figures["val_agreement"] = agreement(logits_NC, predict(teacher, val))
    counts = count(module, val.image_shape)
    weights = artifacts.folder(described.name) / "model.safetensors"
    return figures | {
        "parameters": counts.parameters,
        "multiply_adds": counts.multiply_adds,
        "size_bytes": weights.stat().st_size,
        "epochs": len(history),
        "samples_seen": history[-1].step * described.recipe["batch_size"],
    }


def final_figures(metrics: Mapping[str, float]) -> dict[str, float]:
    """What tracked runs are compared by; sizes in millions."""
    return {
        **{name: value for name, value in metrics.items() if name.startswith("val_")},
        "params_m": metrics["parameters"] / 1e6,
        "multiply_adds_m": metrics["multiply_adds"] / 1e6,
        "size_mb": metrics["size_bytes"] / 1e6,
        "samples_seen": metrics["samples_seen"],
    }


def check_disk(module: nn.Module) -> None:
    """Refuse to start where the checkpoint and the model could not be written at the end.

    Raises:
        ArtifactError: names the folder and what it needs.
    """
    size = sum(t.numel() * t.element_size() for t in module.state_dict().values())
    wanted = 6 * size + 2**26  # a checkpoint (weights, mean, two optimiser states) twice; records
    free = shutil.disk_usage(Path.cwd()).free
    if free < wanted:
        raise ArtifactError(
            f"{Path.cwd()} has {free / 2**20:.0f} MiB free, training needs {wanted / 2**20:.0f}: "
            "free some space (`dvc gc --workspace` drops unused artifacts)"
        )


class Progress:
    """Tells of each epoch: a line for people, figures for the tracking run."""

    def __init__(self, role: Role, run: Run) -> None:
        """Args: who learns, and where its figures go."""
        self.role = role
        self.run = run
        self.started = time.monotonic()
        self.first: int | None = None

    def __call__(self, epoch: Epoch) -> None:
        """Tell of `epoch`."""
        if self.first is None:
            self.first = epoch.number - 1  # where a resumed run set out
        total = self.role.recipe.epochs
        share = (total - epoch.number) / (epoch.number - self.first)
        left = (time.monotonic() - self.started) * share
        validation = "".join(f"  val {name} {v:.4f}" for name, v in epoch.validation.items())
        print(
            f"{self.role.run_name}  epoch {epoch.number}/{total}  loss {epoch.train_loss:.4f}"
            f"{validation}  {epoch.images_per_second:.0f} images/s  {left:.0f} s left",
            flush=True,
        )
        self.run.log_epoch(
            epoch.number,
            {
                "train_loss": epoch.train_loss,
                "lr": epoch.lr,
                "images_per_second": epoch.images_per_second,
                **{f"val_{name}": value for name, value in epoch.validation.items()},
            },
        )
