from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from kd.component import ConfigError
from kd.methods import KD, Method, hard_loss, label_probs, soft_loss
from tests import checks_methods, reference

METHODS = get_args(Method) or (Method,)
CHECKS = [
    check for name, check in sorted(vars(checks_methods).items()) if name.startswith("check_that")
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_every_method_passes_the_battery(method, check):
    check(method())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_kd_equals_the_float64_oracle(temperature, alpha):
    logits, soft, labels = checks_methods.batch(seed=3)
    ours = KD(temperature=temperature, alpha=alpha).loss(logits, soft, labels)
    slow = reference.kd_loss(
        logits.tolist(), soft.exp().tolist(), labels.tolist(), temperature, alpha
    )
    assert float(ours) == pytest.approx(slow, rel=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_kd_is_continuous_in_alpha_at_both_ends(alpha):
    near = abs(alpha - 1e-7)
    batch = checks_methods.batch()
    torch.testing.assert_close(KD(alpha=alpha).loss(*batch), KD(alpha=near).loss(*batch))


def test_alpha_0_is_the_hard_loss_and_alpha_1_the_soft_loss():
    logits, soft, labels = checks_methods.batch()
    hard = KD(alpha=0.0).loss(logits, soft, labels)
    torch.testing.assert_close(hard, hard_loss(logits, labels))
    torch.testing.assert_close(
        KD(alpha=1.0).loss(logits, soft, labels), soft_loss(logits, soft, 4)
    )


def test_the_soft_loss_does_not_shrink_with_the_number_of_classes():
    """Public code divides by C as well; classes that nobody predicts must not change the loss."""
    logits, targets = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    padding = torch.full((1, 98), -200.0)
    few = soft_loss(logits, F.log_softmax(targets, 1), 1.0)
    wide_targets = F.log_softmax(torch.cat([targets, padding], 1), 1)
    many = soft_loss(torch.cat([logits, padding], 1), wide_targets, 1.0)
    torch.testing.assert_close(many, few)


def test_the_gradient_keeps_its_scale_as_the_temperature_grows():
    """T^2 KL tends to the squared distance of centred logits over 2C (Hinton 2015, eq. 4)."""
    student = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(8, 5, dtype=torch.float64)
    temperature = 200.0
    soft_loss(student, F.log_softmax(teacher / temperature, 1), temperature).backward()
    centred = lambda z: z - z.mean(1, keepdim=True)  # noqa: E731
    limit = (centred(student.detach()) - centred(teacher)) / (5 * 8)
    torch.testing.assert_close(student.grad, limit, rtol=0.05, atol=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_label_probs_equal_the_oracle_and_are_zero_where_unlabelled(smoothing):
    labels = torch.tensor([2, -1, 0])
    rows = [reference.label_row(int(label), 4, smoothing) for label in labels]
    torch.testing.assert_close(label_probs(labels, 4, smoothing), torch.tensor(rows))


def test_hard_loss_equals_pytorch_where_all_are_labelled():
    logits, labels = torch.randn(9, 4), torch.randint(4, (9,))
    torch.testing.assert_close(
        hard_loss(logits, label_probs(labels, 4)), F.cross_entropy(logits, labels)
    )


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", 0.0), ("temperature", -1.0), ("alpha", 1.1)]
)
def test_kd_refuses_values_out_of_range(field, value):
    with pytest.raises(ConfigError, match=field):
        KD(**{field: value})
