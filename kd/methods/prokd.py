"""Pro-KD: follow the teacher's footsteps (Rezagholizadeh et al., COLING 2022, arXiv 2110.08532).

M networks (the student, then the teacher), B batch, C classes.
"""

from typing import ClassVar, Literal

from torch import Tensor

from kd.component import component, require
from kd.methods.annealed import annealing, logit_distances
from kd.methods.learning import ONE
from kd.methods.losses import hard_loss, log_probs
from kd.methods.peers import Together
from kd.methods.shown import Shown


@component
class ProKD(Together):
    """First the distance to the teacher's logits at the same step of its training; then labels.

    The one peer is the teacher.  It trains on labels alone alongside the student, so the student
    follows its trajectory step by step and no checkpoints need be kept.  Both trainings are
    equally long, and the student does not see the teacher after `regression` of it (our
    interpretation; in the paper the student follows a teacher that was trained
    beforehand to its end).  Distance and annealing are those of `annealed`.
    """

    kind: Literal["prokd"] = "prokd"
    levels: int = 10
    """Number of temperatures in the annealing, at least 1."""
    regression: float = 0.75
    """Share of the training in which the student follows the teacher, in (0, 1]."""

    num_peers: ClassVar[range] = ONE

    def __post_init__(self) -> None:
        require(self.levels >= 1, "levels", self.levels, "at least 1")
        require(0 < self.regression <= 1, "regression", self.regression, "in (0, 1]")

    def labels_alone(self, progress: float) -> bool:
        """After `regression` of the training."""
        return progress >= self.regression

    def loss(self, shown: Shown) -> Tensor:
        """The student's loss and the teacher's."""
        student_BC, teacher_BC = shown.also["logits_MBC"]
        teachers = hard_loss(teacher_BC, shown.label_probs_BC, shown.labelled)
        if self.labels_alone(shown.progress):
            return hard_loss(student_BC, shown.label_probs_BC, shown.labelled) + teachers
        factor = annealing(shown.progress / self.regression, self.levels)
        targets_BC = factor * log_probs(teacher_BC.detach())
        return logit_distances(student_BC, targets_BC).mean() + teachers
