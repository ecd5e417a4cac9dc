"""ProKT: local targets, from a teacher that stays near (Shi et al., 2021, arXiv 2107.09305).

M networks (the student, then the teacher), B batch, C classes.
"""

from typing import ClassVar, Literal

from torch import Tensor

from kd.component import component, require
from kd.methods.learning import ONE
from kd.methods.losses import hard_loss
from kd.methods.peers import Together, pulled
from kd.methods.shown import Shown


@component
class ProKT(Together):
    """Teacher: hard loss + nearness * KL(student || teacher).  Student: KD from the teacher.

    The one peer is the teacher; both start untrained and are updated together.  That divergence
    stands for the paper's mirror descent, which keeps the teacher near; the exact form is our
    interpretation.
    """

    kind: Literal["prokt"] = "prokt"
    temperature: float = 4.0
    """Divides the logits before the softmax, in teacher and student alike; above 0."""
    alpha: float = 0.9
    """Weight of the student's soft loss, in [0, 1]; its hard loss gets the rest."""
    nearness: float = 0.1
    """How strongly the teacher is kept near the student, at least 0."""

    num_peers: ClassVar[range] = ONE

    def __post_init__(self) -> None:
        require(self.temperature > 0, "temperature", self.temperature, "above 0")
        require(0 <= self.alpha <= 1, "alpha", self.alpha, "in [0, 1]")
        require(self.nearness >= 0, "nearness", self.nearness, "at least 0")

    def loss(self, shown: Shown) -> Tensor:
        """The student's loss and the teacher's."""
        student_BC, teacher_BC = shown.also["logits_MBC"]
        soft = pulled(student_BC, teacher_BC, self.temperature)
        hard = hard_loss(student_BC, shown.label_probs_BC, shown.labelled)
        near = pulled(teacher_BC, student_BC, self.temperature)
        teachers = (
            hard_loss(teacher_BC, shown.label_probs_BC, shown.labelled) + self.nearness * near
        )
        return self.alpha * soft + (1 - self.alpha) * hard + teachers
