"""The student's own running mean as its teacher (Tarvainen & Valpola, 2017, arXiv 1703.01780)."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor, nn

from kd.component import component, require
from kd.methods.learner import Answer, Frozen, Learner, decay_at
from kd.methods.learning import Learning
from kd.methods.losses import hard_loss
from kd.methods.peers import pulled, ramp
from kd.methods.shown import Members, Shown


class WithMean(Learner):
    """A student and the running mean of its weights."""

    def __init__(self, student: nn.Module, decay: float) -> None:
        super().__init__(student)
        self.decay = decay
        self.mean = Frozen(student)

    def answer(self, images: Tensor) -> Answer:
        """The student's logits, and the mean's as `mean_BC`."""
        return self.student(images), {"mean_BC": self.mean(images)}

    def after_step(self, done: int) -> None:
        """Bring the mean up to date."""
        self.mean.follow(self.student, decay_at(done - 1, self.decay))


@component
class OwnMean(Learning):
    """Hard loss + ramp * weight * T^2 KL(running mean at T || student at T).

    Mean and student are shown the same view: a teacher costs no training, and no other network.
    The student is kept, where the paper's figures are the mean's: `recipe.ema` keeps a mean.
    """

    kind: Literal["own_mean"] = "own_mean"
    temperature: float = 1.0
    """Divides the logits before the softmax, above 0."""
    weight: float = 1.0
    """Of the soft loss, beside 1 for the hard loss; at least 0."""
    decay: float = 0.99
    """Share of the mean that stays at each step, in [0, 1); at first less (`decay_at`)."""
    rise: float = 0.3
    """Share of the training in which the soft loss rises to its weight, in [0, 1]."""
    pool: bool = False
    """Whether unlabelled images are shown, too, as in the paper: there a fixed share of each
    batch has labels; here as many as chance brings."""

    alone: ClassVar[bool] = True

    @property
    def uses_pool(self) -> bool:
        """Whether it is shown unlabelled images."""
        return self.pool

    def __post_init__(self) -> None:
        require(self.temperature > 0, "temperature", self.temperature, "above 0")
        require(self.weight >= 0, "weight", self.weight, "at least 0")
        require(0 <= self.decay < 1, "decay", self.decay, "in [0, 1)")
        require(0 <= self.rise <= 1, "rise", self.rise, "in [0, 1]")

    def learner(
        self, student: nn.Module, peers: Sequence[nn.Module], members: Members | None = None
    ) -> nn.Module:
        """The student and its mean."""
        return WithMean(student, self.decay)

    def loss(self, shown: Shown) -> Tensor:
        """The loss of a batch, a scalar."""
        soft = pulled(shown.logits_BC, shown.also["mean_BC"], self.temperature)
        hard = hard_loss(shown.logits_BC, shown.label_probs_BC, shown.labelled)
        return hard + ramp(shown.progress, self.rise) * self.weight * soft
