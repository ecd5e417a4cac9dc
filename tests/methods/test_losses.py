import pytest
import torch
import torch.nn.functional as F

from kd.methods import hard_loss, label_probs, soft_loss
from kd.methods.losses import constant
from tests import reference


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


def test_targets_in_half_precision_are_compared_in_single():
    logits, targets = torch.randn(8, 5), torch.randn(8, 5).log_softmax(1).bfloat16()
    whole = soft_loss(logits, targets.float(), 1.0)
    torch.testing.assert_close(soft_loss(logits, targets, 1.0), whole, rtol=0, atol=0)


def test_numbers_first_needed_in_inference_mode_may_enter_a_loss_that_learns():
    """Teachers are asked in inference mode, and a gate learns from the weights they have there."""
    given = (0.125, 0.875), torch.float32, torch.device("cpu")
    with torch.inference_mode():
        constant(*given)
    factors = torch.ones(2, requires_grad=True)
    (constant(*given) * factors).sum().backward()
    assert factors.grad.tolist() == [0.125, 0.875]
