"""The two kinds of trust: by image alone, or by the student's output for the image.

B batch, K members, C classes.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from kd.methods.shown import Members


class ByImage(ABC):
    """Needs only the teachers and the label, so it can be precomputed and cached."""

    alone: ClassVar[bool] = True
    """Whether its weights for an image are independent of the rest of the batch."""
    emphasizes: ClassVar[bool] = False
    """Whether it also weights images."""
    reads_labels: ClassVar[bool] = False
    """Whether it needs an image's own label, which mixed images lack."""
    unlabelled: float = 1.0
    """How much an unlabelled image counts relative to a labelled one, if it weights images."""

    @abstractmethod
    def factors(self, log_probs_KBC: Tensor, labels_B: Tensor) -> Tensor:
        """How much each member counts for each image (B, K): non-negative, not normalised.

        Args:
            log_probs_KBC: Every member's, at temperature 1.
            labels_B: Class indices; -1 where unlabelled.
        """

    def emphasis(self, log_probs_KBC: Tensor, labels_B: Tensor, weights_BK: Tensor) -> Tensor:
        """How much each image counts (B,), non-negative; scaled per batch later (`evened`).

        Args:
            log_probs_KBC: Every member's, at temperature 1.
            labels_B: Class indices; -1 where unlabelled.
            weights_BK: How much each member counts for each image, summing to 1.
        """
        return torch.ones_like(weights_BK[:, 0])


class ByStudent(ABC):
    """Needs the student's logits, so it is computed at every step."""

    alone: ClassVar[bool] = False
    """Whether its weights for an image are independent of the rest of the batch."""

    @abstractmethod
    def factors(self, gradients_KBC: Tensor, members: Members) -> Tensor:
        """How much each member counts for each image (B, K): non-negative, not normalised.

        Args:
            gradients_KBC: p_student - p_member at T, the first of the method's temperatures.  T
                times this is the gradient of T^2 KL, plain KD's soft loss under that member
                alone, by the student's logits (standardised if `standardize`).  Methods with
                another soft loss use the same.  Detached.
            members: The teachers.
        """


def cross_entropies(log_probs_KBC: Tensor, labels_B: Tensor) -> Tensor:
    """Each member's -log p[label] (K, B); 0 where unlabelled, so that all members are equal."""
    members, batch, _ = log_probs_KBC.shape
    index_KB1 = labels_B.clamp(min=0).expand(members, batch).unsqueeze(2)
    found_KB = -log_probs_KBC.gather(2, index_KB1).squeeze(2)
    return torch.where(labels_B >= 0, found_KB, torch.zeros_like(found_KB))


def fewer_shares(costs_KB: Tensor) -> Tensor:
    """(1 - cost) / (K - 1) as (B, K), from costs (K, B) that sum to 1 over the members.

    A lone member gets 1.
    """
    members = len(costs_KB)
    if members == 1:
        return torch.ones_like(costs_KB.T)
    return (1 - costs_KB.T) / (members - 1)
