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
        """Update the mean."""
        self.mean.follow(self.student, decay_at(done - 1, self.decay))


@component
class OwnMean(Learning):
    """Hard loss + ramp * weight * T^2 KL(running mean at T || student at T).

    Mean and student see the same view.  No other network is trained.  The student is what is
    kept, while the paper reports the mean; to keep a mean, set `recipe.ema`.
    """

    kind: Literal["own_mean"] = "own_mean"
    temperature: float = 1.0
    """Divides the logits before the softmax, above 0."""
    weight: float = 1.0
    """Weight of the soft loss (the hard loss has 1), at least 0."""
    decay: float = 0.99
    """Decay of the mean at each step, in [0, 1); less at first (`decay_at`)."""
    rise: float = 0.3
    """Share of the training in which the soft loss ramps up to its weight, in [0, 1]."""
    pool: bool = False
    """Whether to use unlabelled images too, as in the paper; there a fixed share of each batch
    is labelled, here that share is random."""

    alone: ClassVar[bool] = True

    @property
    def uses_pool(self) -> bool:
        """Whether it sees unlabelled images."""
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
