"""Knowledge distillation (Hinton, Vinyals and Dean, arXiv 1503.02531)."""

from typing import ClassVar, Literal

from torch import Tensor

from kd.component import component
from kd.methods.losses import soft_losses
from kd.methods.shown import Shown
from kd.methods.taught import SoftMethod


@component
class KD(SoftMethod):
    """alpha T^2 KL(soft targets || student) + (1 - alpha) cross-entropy (section 2).

    With a fixed ensemble this is AVER of the multi-teacher papers; with an earlier copy of the
    student as teacher it is born-again distillation and Tf-KD_self; with alpha 1, temperature 1
    and mixup in the recipe it is "patient and consistent" teaching (Beyer et al., CVPR 2022).
    """

    kind: Literal["kd"] = "kd"

    alone: ClassVar[bool] = True

    def soft(
        self, logits_BC: Tensor, soft_log_probs_BC: Tensor, temperature: float, shown: Shown
    ) -> Tensor:
        """T^2 KL of each image (B,)."""
        return soft_losses(logits_BC, soft_log_probs_BC, temperature)
