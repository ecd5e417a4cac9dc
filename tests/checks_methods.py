"""What every method must satisfy; check_method(MyMethod()) runs it on a user's own."""

from typing import Any

import torch
import torch.nn.functional as F

from kd.methods import label_probs

B, C = 16, 7


def check_method(method: Any) -> None:
    """Run the whole battery on one method."""
    for name, check in sorted(globals().items()):
        if name.startswith("check_") and name != "check_method":
            check(method)


def batch(seed: int = 0, num_classes: int = C) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, soft log-probs and label probs of a random batch, in float64."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(B, num_classes, generator=generator, dtype=torch.float64)
    soft = 3 * torch.randn(B, num_classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(num_classes, (B,), generator=generator)
    return logits, F.log_softmax(soft, 1), label_probs(labels, num_classes)


def check_that_the_loss_is_a_finite_scalar_with_a_gradient(method: Any) -> None:
    logits, soft, labels = batch()
    logits.requires_grad_()
    loss = method.loss(logits, soft, labels)
    loss.backward()
    assert loss.shape == ()
    assert loss.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad.abs().sum() > 0


def check_that_extreme_logits_stay_finite(method: Any) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits = torch.tensor([[1e3, -1e3, 0.0], [-1e3, 1e3, 1e3]], dtype=dtype).requires_grad_()
        soft = F.log_softmax(torch.tensor([[-1e3, 1e3, 0.0], [1e3, -1e3, 0.0]]), 1)
        loss = method.loss(logits, soft, label_probs(torch.tensor([1, 0]), 3))
        loss.backward()
        assert loss.isfinite()
        assert logits.grad is not None
        assert logits.grad.isfinite().all()


def check_that_no_gradient_reaches_the_targets(method: Any) -> None:
    logits, soft, labels = batch()
    soft.requires_grad_()
    assert not method.loss(logits, soft.detach(), labels).requires_grad


def check_that_the_order_of_images_does_not_matter(method: Any) -> None:
    logits, soft, labels = batch()
    order = torch.randperm(B, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        method.loss(logits, soft, labels), method.loss(logits[order], soft[order], labels[order])
    )


def check_that_the_order_of_classes_does_not_matter(method: Any) -> None:
    logits, soft, labels = batch()
    order = torch.randperm(C, generator=torch.Generator().manual_seed(1))
    permuted = method.loss(logits[:, order], soft[:, order], labels[:, order])
    torch.testing.assert_close(method.loss(logits, soft, labels), permuted)


def check_that_adding_a_constant_to_the_logits_changes_nothing(method: Any) -> None:
    logits, soft, labels = batch()
    shift = torch.linspace(-50, 50, B, dtype=logits.dtype).unsqueeze(1)
    torch.testing.assert_close(
        method.loss(logits + shift, soft, labels),
        method.loss(logits, soft, labels),
        rtol=1e-4,
        atol=1e-5,
    )


def check_that_a_repeated_batch_has_the_same_loss(method: Any) -> None:
    logits, soft, labels = batch()
    twice = method.loss(logits.repeat(2, 1), soft.repeat(2, 1), labels.repeat(2, 1))
    torch.testing.assert_close(twice, method.loss(logits, soft, labels))


def check_that_unlabelled_images_have_no_hard_loss(method: Any) -> None:
    logits, _, labels = batch()
    unlabelled = torch.zeros_like(labels)
    loss = method.loss(logits, F.log_softmax(logits / method.temperature, 1), unlabelled)
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-5)


def check_that_a_student_equal_to_its_targets_has_neither_loss_nor_gradient(method: Any) -> None:
    logits, _, labels = batch()
    logits.requires_grad_()
    soft = F.log_softmax(logits.detach() / method.temperature, 1)
    loss = method.loss(logits, soft, torch.zeros_like(labels))
    loss.backward()
    assert logits.grad is not None
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits), rtol=0, atol=1e-5)


def check_that_two_classes_are_enough(method: Any) -> None:
    logits, soft, labels = batch(num_classes=2)
    assert method.loss(logits, soft, labels).isfinite()


def check_that_autocast_changes_nothing(method: Any) -> None:
    logits, soft, labels = batch()
    plain = method.loss(logits.float(), soft.float(), labels)
    with torch.autocast("cpu", torch.bfloat16):
        cast = method.loss(logits.float(), soft.float(), labels)
    torch.testing.assert_close(cast, plain, rtol=0, atol=0)
