"""Quantisation-aware distillation: the student learns on, as before, with int8 simulated.

The same teachers with the same weights, the same method and loop; only the network rounds its
weights and activations as the exported file will, so that it learns to do without what rounding
takes.  What comes out is an ordinary network again, which any format quantises as it would the
original.
"""

from collections.abc import Callable
from dataclasses import replace

from kd import artifacts
from kd.component import ConfigError
from kd.ensemble import Ensemble
from kd.exporters import Int8, Parity, Trained
from kd.exporters.pt2e import simulated, with_weights_of
from kd.progress import Progress
from kd.recipe import Recipe
from kd.roles import (
    DATA,
    Role,
    asked_to_stop,
    load_teachers,
    training_images,
)
from kd.train import fit
from kd.train.device import prepare


def when_called_for(
    int8: Int8 | None, trained: Trained, role: Role
) -> Callable[[Parity], Trained | None]:
    """What `export_and_check` asks, once it knows what calibration alone has cost.

    Args:
        int8: The format's settings; None where it has none.
        trained: The network that was exported.
        role: How that network was trained.

    Raises:
        ConfigError: its method trains other networks along with it, which is not done in int8.
    """
    if int8 and int8.qat_when_loss_above is not None and role.peers:
        raise ConfigError(
            "int8.qat_when_loss_above is set, but student.peers learn along with the student, "
            "which is not done with int8 simulated: set it to null, or take a method with "
            "fixed teachers"
        )

    def answer(parity: Parity) -> Trained | None:
        above = int8.qat_when_loss_above if int8 and parity.precision == "int8" else None
        if int8 is None or above is None or parity.lost_points <= above:
            return None
        print(f"int8 lost {parity.lost_points:.2f} points, above {above}: fine-tuning", flush=True)
        return fine_tuned(int8, trained, role)

    return answer


def fine_tuned(int8: Int8, trained: Trained, role: Role) -> Trained:
    """The network after some epochs under its teachers with int8 simulated.

    Raises:
        ArtifactError: a teacher is missing or is not the one that taught the network.
        ConfigError: the network cannot be traced.
    """
    recipe, method = gentle(role.recipe, int8), role.method.resolved() if role.method else None
    device = prepare(recipe)
    record = artifacts.read_json(artifacts.folder(DATA) / "data.json")
    members, _ = load_teachers(role, record["data_hash"])
    names = tuple(name.removeprefix("assistants/") for name in role.teachers)
    weights_K = tuple(role.teachers.values())
    ensemble = Ensemble(members, weights_K, role.mixing, names) if members else None
    learns_from_pool = ensemble is not None or (method is not None and method.uses_pool)
    images, epoch_steps = training_images(role, device, learns_from_pool)
    student = simulated(trained.module, trained.image_shape)
    learner = student
    if method is not None:
        learner = method.learner(student, [], ensemble.described() if ensemble else None)
    progress = Progress(f"{role.run_name} in int8", recipe.epochs, epoch_steps)
    with asked_to_stop() as stop, progress:
        fit(
            learner,
            images,
            recipe,
            seed=role.seed,
            num_classes=len(trained.class_names),
            epoch_steps=epoch_steps,
            method=method,
            ensemble=ensemble,
            on_step=progress.step,
            on_epoch=progress.epoch,
            stop=stop,
        )
    return replace(trained, module=with_weights_of(student.cpu(), trained.module))


def gentle(recipe: Recipe, int8: Int8) -> Recipe:
    """The student's recipe, shorter, at a lower rate, on one device; no mean, plain arithmetic."""
    optimizer = replace(recipe.optimizer, lr=recipe.optimizer.lr * int8.qat_lr)
    return replace(
        recipe,
        epochs=int8.qat_epochs,
        optimizer=optimizer,
        ema=None,
        precision="fp32",
        memory_format="channels_last",
        compile=False,
        devices=1,
    )
