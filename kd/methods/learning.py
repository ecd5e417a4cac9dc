"""The base class of all methods."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor, nn

from kd.methods.shown import Members, Reduction, Shown

Needs = Literal["teachers", "peers", "nobody"]
NOBODY, ONE, SOME = range(1), range(1, 2), range(1, 100)
"""How many peers a method can have."""


class Learning(ABC):
    """How a student learns: a loss, and whatever trains along with the student."""

    needs: ClassVar[Needs] = "nobody"
    """teachers: a frozen ensemble; peers: networks that train along with it; nobody: labels, or
    targets that the method makes itself."""
    num_peers: ClassVar[range] = NOBODY
    """How many peers it can have."""
    alone: ClassVar[bool] = False
    """Whether the loss of an image is independent of the rest of the batch."""

    @property
    def uses_pool(self) -> bool:
        """Whether it sees unlabelled images even without teachers."""
        return False

    @property
    def by_image(self) -> bool:
        """Whether the mean loss of a batch's equal parts is the loss of the batch."""
        return self.alone

    def labels_alone(self, progress: float) -> bool:
        """Whether only labels count at this point of the training.  Batches then hold only
        labelled images, as many as ever, and teachers are not evaluated.
        """
        return False

    def resolved(self) -> "Learning":
        """The method itself, or the one that it names by import path."""
        return self

    @abstractmethod
    def loss(self, shown: Shown) -> Tensor:
        """The loss of a batch, a scalar."""

    def reduction(self, members: Members) -> Reduction | None:
        """How to reduce the teachers' logits for `loss`; None if the method does not use them."""
        return None

    def learner(
        self, student: nn.Module, peers: Sequence[nn.Module], members: Members | None = None
    ) -> nn.Module:
        """The module to train: the student, or a `kd.methods.learner.Learner` that holds it.

        Args:
            student: The network that is kept in the end.
            peers: Networks that train along with it, as many as `num_peers` allows.
            members: Its teachers; None if it has none.
        """
        return student
