"""Quantisation-aware distillation: the student is trained further, with int8 simulated.

Teachers, weights, method and training loop stay the same; only the network rounds its weights and
activations as the exported file will, so that it learns to compensate.  If the student had several
generations, this is one more: taught by the last, which is the student itself.  The result is an
ordinary network again, which any format quantises as it would the original.
"""

from collections.abc import Callable
from dataclasses import asdict, replace

from kd import artifacts
from kd.component import ConfigError, own_sources
from kd.ensemble import Ensemble, digest_of_tensors
from kd.exporters import Int8, Parity, Trained
from kd.exporters.files import for_export
from kd.exporters.pt2e import simulated, with_weights_of
from kd.recipe import Recipe
from kd.roles import Role, checkpoint_of, describe, ensemble_of, load_teachers, taught
from kd.stopping import asked_to_stop
from kd.train.device import prepare

SOURCES = (*artifacts.LEARNING, "qat.py", "exporters/pt2e.py")
"""Code that decides what is learned."""


def when_called_for(
    int8: Int8 | None, trained: Trained, role: Role, run_name: str
) -> Callable[[Parity], Trained | None]:
    """A callback for `export_and_check`: fine-tune if calibration alone lost too much.

    Args:
        int8: The format's settings; None if it has none.
        trained: The network that was exported.
        role: How that network was trained.
        run_name: The export's.

    Raises:
        ConfigError: it has peers, which cannot be trained along with it in int8.
    """
    if int8 and int8.qat_when_loss_above is not None and role.peers:
        raise ConfigError(
            "int8.qat_when_loss_above is set, but student.peers cannot learn along with a student "
            "whose int8 is simulated: set it to null, or use a method with fixed teachers"
        )

    def answer(parity: Parity) -> Trained | None:
        above = int8.qat_when_loss_above if int8 and parity.precision == "int8" else None
        if int8 is None or above is None or parity.lost_points <= above:
            return None
        print(f"int8 lost {parity.lost_points:.2f} points, above {above}: fine-tuning", flush=True)
        return fine_tuned(int8, trained, role, run_name)

    return answer


def fine_tuned(int8: Int8, trained: Trained, role: Role, run_name: str) -> Trained:
    """Train the network further under its teachers with int8 simulated.

    Raises:
        ArtifactError: a teacher is missing or is not the one that taught the network.
        ConfigError: the network cannot be traced.
    """
    role = replace(role, run_name=run_name, recipe=gentle(role.recipe, int8))
    device = prepare(role.recipe)
    record = artifacts.data_record()
    members, origins = load_teachers(role, record["data_hash"])
    ensemble = ensemble_of(role, members)
    if role.generations > 1:
        ensemble = Ensemble((for_export(trained.module),), (1.0,))
    described = replace(
        describe(role, record, origins, device),
        sha256=digest_of_tensors(trained.module.state_dict()),
        code=artifacts.code_digest(SOURCES, own_sources(asdict(role))),
    )
    checkpoint = checkpoint_of(described, role.generations)
    student = simulated(trained.module, trained.image_shape)
    with asked_to_stop() as stop:
        # No validation: the simulated ranges would adapt to the validation images.
        taught(student, role, described, ensemble, checkpoint, stop)
    checkpoint.remove()
    return replace(trained, module=with_weights_of(student.cpu(), trained.module))


def gentle(recipe: Recipe, int8: Int8) -> Recipe:
    """The student's recipe, but shorter, at a lower rate, on one device, without EMA, in fp32."""
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
