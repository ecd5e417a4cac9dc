"""What every method has, whoever teaches."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor, nn

from kd.methods.shown import Members, Reduction, Shown

Needs = Literal["teachers", "peers", "nobody"]
NOBODY, ONE, SOME = range(1), range(1, 2), range(1, 100)
"""How many peers a method can do with."""


class Learning(ABC):
    """How a student learns: a loss, and what trains along with the student, if anything does."""

    needs: ClassVar[Needs] = "nobody"
    """teachers: a frozen ensemble; peers: networks that learn along with it; nobody: labels, or
    what the method makes up itself."""
    num_peers: ClassVar[range] = NOBODY
    """With how many peers it works."""
    alone: ClassVar[bool] = False
    """Whether its loss looks at each image alone, none beside another."""

    @property
    def uses_pool(self) -> bool:
        """Whether it is shown unlabelled images though it has no teachers."""
        return False

    @property
    def by_image(self) -> bool:
        """Whether the mean loss of a batch's parts is the batch's."""
        return self.alone

    def labels_alone(self, progress: float) -> bool:
        """Whether at this point of the training nothing but labels teaches: then labelled images
        alone are shown, as many in a batch as ever, and teachers are not asked.
        """
        return False

    def resolved(self) -> "Learning":
        """The method that does the work: itself, but for one that is named by import path."""
        return self

    @abstractmethod
    def loss(self, shown: Shown) -> Tensor:
        """The loss of a batch, a scalar."""

    def reduction(self, members: Members) -> Reduction | None:
        """What is kept of the teachers' logits for `loss`; None where they are not listened to."""
        return None

    def learner(
        self, student: nn.Module, peers: Sequence[nn.Module], members: Members | None = None
    ) -> nn.Module:
        """What is trained: the student, or a `kd.methods.learner.Learner` round it.

        Args:
            student: Who is kept in the end.
            peers: Networks that learn along with it, as many as `num_peers` allows.
            members: Its teachers; None where it has none.
        """
        return student
