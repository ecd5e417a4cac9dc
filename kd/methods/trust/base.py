"""The two forms that trust has: by image alone, or by what the student says of the image.

B batch, K members, C classes.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from kd.methods.shown import Members


class ByImage(ABC):
    """Needs the teachers and the label alone, so it is part of what can be computed beforehand."""

    alone: ClassVar[bool] = True
    """Whether what it says of an image depends on no other in the batch."""
    emphasizes: ClassVar[bool] = False
    """Whether it weighs images as well."""
    reads_labels: ClassVar[bool] = False
    """Whether it needs an image's own label, which a mixed image has not."""
    unlabelled: float = 1.0
    """How much an unlabelled image counts beside a labelled one, where it weighs images."""

    @abstractmethod
    def factors(self, log_probs_KBC: Tensor, labels_B: Tensor) -> Tensor:
        """How much each member counts for each image (B, K), none negative, of any sum.

        Args:
            log_probs_KBC: Every member's, at temperature 1.
            labels_B: Class indices; -1 where unlabelled.
        """

    def emphasis(self, log_probs_KBC: Tensor, labels_B: Tensor, weights_BK: Tensor) -> Tensor:
        """How much each image counts (B,), none negative; made even over a batch later (`evened`).

        Args:
            log_probs_KBC: Every member's, at temperature 1.
            labels_B: Class indices; -1 where unlabelled.
            weights_BK: How much each member counts for each image, summing to 1.
        """
        return torch.ones_like(weights_BK[:, 0])


class ByStudent(ABC):
    """Needs the student's answer, so it is asked at every step."""

    alone: ClassVar[bool] = False
    """Whether what it says of an image depends on no other in the batch."""

    @abstractmethod
    def factors(self, gradients_KBC: Tensor, members: Members) -> Tensor:
        """How much each member counts for each image (B, K), none negative, of any sum.

        Args:
            gradients_KBC: p_student - p_member at the first of the method's temperatures, T: the
                gradient of T^2 KL, plain KD's soft loss under that member alone, by the student's
                logits (standardised ones, where those are compared) is T times that.  It is the
                same under methods of another soft loss, and carries no gradient itself.
            members: Who they are.
        """


def cross_entropies(log_probs_KBC: Tensor, labels_B: Tensor) -> Tensor:
    """Each member's -log p[label] (K, B); 0 where unlabelled, as if all were equally right."""
    members, batch, _ = log_probs_KBC.shape
    index_KB1 = labels_B.clamp(min=0).expand(members, batch).unsqueeze(2)
    found_KB = -log_probs_KBC.gather(2, index_KB1).squeeze(2)
    return torch.where(labels_B >= 0, found_KB, torch.zeros_like(found_KB))


def fewer_shares(costs_KB: Tensor) -> Tensor:
    """(1 - share of the cost) / (K - 1), as (B, K): costs that sum to 1 over the members.

    A lone member counts fully.
    """
    members = len(costs_KB)
    if members == 1:
        return torch.ones_like(costs_KB.T)
    return (1 - costs_KB.T) / (members - 1)
