"""What every method must satisfy; check_method(MyMethod()) runs it on a user's own.

B batch, K members, C classes.
"""

import dataclasses
from typing import Any

import pytest
import torch

from kd.component import ConfigError
from kd.methods import Labels, Members, Shown, label_probs

B, C, K = 16, 7, 3


def check_method(method: Any) -> None:
    """Run the whole battery on one method that learns from teachers or labels."""
    for check in CHECKS:
        try:
            check(method)
        except AssertionError as error:
            wanted = check.__name__.removeprefix("check_that_").replace("_", " ")
            raise AssertionError(f"it must hold that {wanted}, but {error}") from None


def batch(
    seed: int = 0, num_classes: int = C, size: int = B, members: int = K
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of a student and of its teachers, in float64, and labels."""
    generator = torch.Generator().manual_seed(seed)
    shape = (members + 1, size, num_classes)
    logits = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return logits[0], logits[1:], torch.randint(num_classes, (size,), generator=generator)


def loss_of(
    method: Any,
    logits_BC: torch.Tensor,
    logits_KBC: torch.Tensor,
    labels_B: torch.Tensor,
    progress: float = 0.5,
    weights: tuple[float, ...] | None = None,
) -> torch.Tensor:
    """The method's loss, by the way that training goes: reduction, rows, loss."""
    members = len(logits_KBC)
    given = weights or (1 / members,) * members
    described = Members(tuple(map(str, range(members))), given)
    reduction = method.reduction(described)
    rows_BR = reduction and reduction(logits_KBC, labels_B)
    labels_BC = label_probs(labels_B, logits_BC.shape[1]).to(logits_BC.device)
    torch.manual_seed(0)
    return method.loss(Shown(logits_BC, labels_BC, rows_BR, described, progress))


def gradient_of(method: Any, logits_BC: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
    """The gradient of that loss by the student's logits."""
    leaf = logits_BC.clone().requires_grad_()
    loss_of(method, leaf, *rest, **more).backward()
    assert leaf.grad is not None
    return leaf.grad


def assert_finite(what: str, value: torch.Tensor) -> None:
    assert value.isfinite().all(), f"the {what} is {value}"


def unlabelled(labels_B: torch.Tensor) -> torch.Tensor:
    return torch.full_like(labels_B, -1)


def check_that_the_loss_is_a_finite_scalar_with_a_gradient(method: Any) -> None:
    for progress in (0.0, 0.3, 0.99):
        loss = loss_of(method, *batch(), progress=progress)
        assert loss.shape == (), f"the loss of a batch has the shape {tuple(loss.shape)}, not ()"
        assert_finite("loss", loss)
    gradient = gradient_of(method, *batch())
    assert_finite("gradient", gradient)
    assert gradient.abs().sum() > 0, "the gradient by the student's logits is 0"


def check_that_extreme_logits_stay_finite(method: Any) -> None:
    teachers = torch.tensor([[[-1e3, 1e3, 0.0], [1e3, -1e3, 0.0]], [[0.0, 0, 0], [1e3, 1e3, 0]]])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits = torch.tensor([[1e3, -1e3, 0.0], [-1e3, 1e3, 1e3]], dtype=dtype)
        for labels in (torch.tensor([1, 0]), torch.tensor([-1, -1])):
            assert_finite("loss", loss_of(method, logits, teachers, labels))
            for asked in (teachers, teachers[:1]):
                assert_finite("gradient", gradient_of(method, logits, asked, labels))


def check_that_the_order_of_images_does_not_matter(method: Any) -> None:
    logits, teachers, labels = batch()
    order = torch.randperm(B, generator=torch.Generator().manual_seed(1))
    shuffled = loss_of(method, logits[order], teachers[:, order], labels[order])
    torch.testing.assert_close(loss_of(method, logits, teachers, labels), shuffled)


def check_that_the_order_of_classes_does_not_matter(method: Any) -> None:
    logits, teachers, labels = batch()
    order = torch.randperm(C, generator=torch.Generator().manual_seed(1))
    permuted = loss_of(method, logits[:, order], teachers[..., order], order.argsort()[labels])
    torch.testing.assert_close(loss_of(method, logits, teachers, labels), permuted)


def check_that_adding_a_constant_to_the_logits_changes_nothing(method: Any) -> None:
    logits, teachers, labels = batch()
    shift = torch.linspace(-50, 50, B, dtype=logits.dtype).unsqueeze(1)
    torch.testing.assert_close(
        loss_of(method, logits + shift, teachers - shift, labels),
        loss_of(method, logits, teachers, labels),
        rtol=1e-4,
        atol=1e-5,
    )


def check_that_a_repeated_batch_has_the_same_loss(method: Any) -> None:
    logits, teachers, labels = batch()
    twice = loss_of(method, logits.repeat(2, 1), teachers.repeat(1, 2, 1), labels.repeat(2))
    once = loss_of(method, logits, teachers, labels)
    torch.testing.assert_close(twice, once, rtol=1e-5, atol=1e-6)


def check_that_a_student_equal_to_its_targets_has_neither_loss_nor_gradient(method: Any) -> None:
    """Unlabelled, so that there is no hard loss either."""
    logits, _, labels = batch()
    same = logits.expand(K, -1, -1)
    loss = loss_of(method, logits, same, unlabelled(labels), progress=0.999)
    gradient = gradient_of(method, logits, same, unlabelled(labels), progress=0.999)
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-5)
    torch.testing.assert_close(gradient, torch.zeros_like(logits), rtol=0, atol=1e-5)


def check_that_an_ensemble_of_equals_is_the_lone_teacher(method: Any) -> None:
    logits, teachers, labels = batch()
    lone = loss_of(method, logits, teachers[:1], labels)
    equals = loss_of(method, logits, teachers[:1].expand(K, -1, -1), labels)
    torch.testing.assert_close(equals, lone)


def check_that_small_ensembles_and_batches_are_defined(method: Any) -> None:
    for members in (1, 2):
        for size in (1, 2):
            given = batch(size=size, members=members)
            assert_finite("loss", loss_of(method, *given))
            assert_finite("gradient", gradient_of(method, *given))


def check_that_two_classes_are_defined_or_refused(method: Any) -> None:
    if getattr(method, "standardize", False):
        with pytest.raises(ConfigError, match="two classes"):
            loss_of(method, *batch(num_classes=2))
    else:
        assert_finite("loss", loss_of(method, *batch(num_classes=2)))
        assert_finite("gradient", gradient_of(method, *batch(num_classes=2)))


def check_that_the_number_of_classes_does_not_set_the_scale_of_the_soft_loss(method: Any) -> None:
    """Ten times as many classes must not make the loss ten times weaker, or stronger."""

    def scale(num_classes: int) -> float:
        logits, teachers, labels = batch(num_classes=num_classes, size=64)
        return float(loss_of(method, logits, teachers[:1], unlabelled(labels)))

    few, many = scale(10), scale(100)
    said = f"it is {few} with 10 classes and {many} with 100"
    assert few == many == 0 or 0.25 < many / few < 4, said


def check_that_alpha_is_continuous_at_both_ends(method: Any) -> None:
    if not any(field.name == "alpha" for field in dataclasses.fields(method)):
        return
    for end in (0.0, 1.0):
        at = loss_of(dataclasses.replace(method, alpha=end), *batch())
        near = loss_of(dataclasses.replace(method, alpha=abs(end - 1e-9)), *batch())
        torch.testing.assert_close(at, near)
    hard = getattr(method, "scale", 1.0) * loss_of(Labels(), *batch())
    torch.testing.assert_close(loss_of(dataclasses.replace(method, alpha=0.0), *batch()), hard)


def check_that_parts_of_a_batch_have_its_mean_loss_where_it_says_so(method: Any) -> None:
    """Training may take a batch in parts, on several devices or one after the other."""
    if not method.by_image:
        return
    logits, teachers, labels = batch()
    halves = [
        loss_of(method, logits[part], teachers[:, part], labels[part])
        for part in (slice(B // 2), slice(B // 2, B))
    ]
    whole = loss_of(method, logits, teachers, labels)
    torch.testing.assert_close(torch.stack(halves).mean(), whole, rtol=1e-5, atol=1e-6)


def check_that_autocast_changes_nothing(method: Any) -> None:
    logits, teachers, labels = batch()
    plain = loss_of(method, logits.float(), teachers.float(), labels)
    with torch.autocast("cpu", torch.bfloat16):
        cast = loss_of(method, logits.float(), teachers.float(), labels)
    torch.testing.assert_close(cast, plain, rtol=0, atol=0)


CHECKS = [check for name, check in sorted(globals().items()) if name.startswith("check_that")]
