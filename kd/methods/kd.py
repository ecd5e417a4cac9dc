"""Knowledge distillation as Hinton, Vinyals and Dean wrote it (arXiv 1503.02531)."""

from typing import Literal

from torch import Tensor

from kd.component import component, require
from kd.methods.losses import hard_loss, soft_loss


@component
class KD:
    """alpha * soft loss + (1 - alpha) * hard loss (Hinton et al., 2015, section 2)."""

    kind: Literal["kd"] = "kd"
    temperature: float = 4.0
    """Divides the logits before the softmax, in teachers and student alike; above 0."""
    alpha: float = 0.9
    """Weight of the soft loss, in [0, 1]; the hard loss gets the rest."""

    def __post_init__(self) -> None:
        require(self.temperature > 0, "temperature", self.temperature, "above 0")
        require(0 <= self.alpha <= 1, "alpha", self.alpha, "in [0, 1]")

    def loss(self, logits_BC: Tensor, soft_log_probs_BC: Tensor, label_probs_BC: Tensor) -> Tensor:
        """The loss of a batch, a scalar; arguments as in kd/methods/losses.py."""
        soft = soft_loss(logits_BC, soft_log_probs_BC, self.temperature)
        return self.alpha * soft + (1 - self.alpha) * hard_loss(logits_BC, label_probs_BC)
