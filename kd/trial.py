"""Try out networks and methods on random images, before any work is done.

Shapes: B batch.
"""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kd.component import ConfigError, raised
from kd.methods import Labels, Learner, Learning, Members, Method, Shown, label_probs, surrounded
from kd.models import Model, build_model


def try_learners(
    learners: Mapping[str, tuple[Model, Method | None, Mapping[str, Model]]],
    *,
    channels: int,
    image_size: int,
    num_classes: int,
) -> None:
    """Build every learner and compute its loss once, so that errors show before any work is done.

    Args:
        learners: Networks, their methods and their peers, by their path in params.yaml.
        channels: 1 (grey) or 3 (colour).
        image_size: Side of the square images, in pixels.
        num_classes: Number of logits.

    Raises:
        ConfigError: a model cannot be built, or does not turn such images into logits; a method
            cannot be imported, cannot use these networks or so few classes, or returns no valid
            loss; or the user's own code raises, or keeps what it learns where no file holds it.
    """
    shape = {"channels": channels, "image_size": image_size, "num_classes": num_classes}
    for path, (model, method, peers) in learners.items():
        try:
            network = build_model(model, **shape)
            beside = {name: build_model(peer, **shape) for name, peer in peers.items()}
            learning = method.resolved() if method else Labels()
            given = (learning, (channels, image_size, image_size), num_classes)
            learner = try_loss(network, beside, *given)
            if "custom" in {each.kind for each in (model, method, *peers.values()) if each}:
                again = {name: build_model(peer, **shape) for name, peer in peers.items()}
                same = try_loss(build_model(model, **shape), again, *given)
                try_state(learner, same, torch.randn(2, *given[1]))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
        except Exception as error:  # the user's own code may raise anything
            raise ConfigError(f"{path}: {raised(error)}") from error


def try_loss(
    network: nn.Module,
    peers: Mapping[str, nn.Module],
    method: Learning,
    image_shape: tuple[int, int, int],
    num_classes: int,
) -> nn.Module:
    """Compute a method's loss on random images once, with random teachers if it needs any.

    Returns:
        The learner that it makes of the networks.

    Raises:
        ConfigError: it cannot use these networks or so few classes, or its loss is not a finite
            scalar with a finite gradient that reaches the student.
    """
    # Sizes that all differ, or a wrong shape could be broadcast.
    batch, number = [size for size in (2, 3, 4) if size != num_classes][:2]
    labels_B = torch.arange(batch) - 1
    members, rows_BR = None, None
    if method.needs == "teachers":
        biased = getattr(getattr(method, "trust", None), "biased", "biased")
        names = (biased, *(f"{biased} {k}" for k in range(1, number)))
        members = Members(names, (1 / number,) * number)
        if reduction := method.reduction(members):
            rows_BR = reduction(torch.randn(number, batch, num_classes), labels_B)
    learner = surrounded(network, method, peers, members)
    said = learner(torch.randn(batch, *image_shape))
    logits_BC, also = said if isinstance(said, tuple) else (said, {})
    labels_BC = label_probs(labels_B, num_classes)
    loss = method.loss(Shown(logits_BC, labels_BC, rows_BR, members, 0.5, 1.0, also))
    found = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
    if found != () or not loss.requires_grad:
        shown = f"{found}{'' if found else ' without a gradient'}"
        wanted = "it must return a tensor of shape (), with a gradient"
        raise ConfigError(f"{type(method).__name__}.loss returned {shown}; {wanted}")
    check_gradient(method, loss, network)
    return learner


def check_gradient(method: Learning, loss: Tensor, network: nn.Module) -> None:
    """Refuse a loss on random images from which nothing can be learned.

    Raises:
        ConfigError: it is not finite, or its gradient is not, or is 0 for the whole network.
    """
    learning = [each for each in network.parameters() if each.requires_grad]
    found = torch.autograd.grad(loss, learning, allow_unused=True) if learning else ()
    gradients = [each for each in found if each is not None]
    name, tried = f"{type(method).__name__}.loss", "on random images"
    if not loss.isfinite():
        raise ConfigError(
            f"{name} is {float(loss.detach())} {tried}: look for a division by 0 or log(0)"
        )
    if not all(bool(each.isfinite().all()) for each in gradients):
        raise ConfigError(f"the gradient of {name} is not finite {tried}: look for a root of 0")
    if not any(bool(each.any()) for each in gradients):
        raise ConfigError(f"{name} gives no parameter of the student a gradient {tried}")


def try_state(learner: nn.Module, other: nn.Module, images_B: Tensor) -> None:
    """Refuse a learner whose state_dict lacks some of what it computes with.

    Files and checkpoints hold a state_dict and nothing else.

    Args:
        learner: It has seen a batch in training mode.
        other: Made in the same way; it gets the other's state.
        images_B: A batch to compare their answers on.

    Raises:
        ConfigError: their answers differ.
    """
    if isinstance(learner, Learner):
        learner.after_step(1)
    other.load_state_dict(learner.state_dict())
    for training in (False, True):
        twin = copy.deepcopy(learner)
        one, same, two = (
            answers(each.train(training), images_B) for each in (learner, twin, other)
        )
        for name in one:
            # What draws numbers elsewhere than from PyTorch differs from its twin, too.
            if close(one[name], same[name]) and not close(one[name], two[name]):
                mode = "training" if training else "evaluation"
                raise ConfigError(
                    f"a {type(learner).__name__} with the state_dict of another gives other "
                    f"{name} in {mode} mode, so what it learned would be lost: use "
                    "register_buffer for tensors that change, and nn.ModuleList for lists of "
                    "layers"
                )


def answers(learner: nn.Module, images_B: Tensor) -> dict[str, Tensor]:
    """What a learner says of a batch, by name; each time with the same random draws."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        said = learner(images_B)
    logits_BC, also = said if isinstance(said, tuple) else (said, {})
    return {"logits": logits_BC, **also}


def close(one: Tensor, two: Tensor) -> bool:
    """Whether two answers are equal but for rounding."""
    return torch.allclose(one, two, rtol=1e-3, atol=1e-4, equal_nan=True)
