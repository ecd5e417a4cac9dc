"""UniKD: by the teachers' correctness, and their disagreement (Wu et al., 2022, arXiv 2204.00548).

B batch, K members, C classes.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from kd.component import component, require
from kd.methods.trust.base import ByImage, cross_entropies


@component
class Correctness(ByImage):
    """Weights members by 1 / (1 + CE_k), labelled images by 1 / (1 + CE of the ensemble), and
    unlabelled images by the members' disagreement, mean_k KL(p_k || mean).

    The paper's abstract names the three ideas; the formulas are our interpretation, the
    first after the same authors' MT-BERT.  Emphasis is scaled to mean 1 over the labelled images
    of a batch, and to mean `unlabelled` over the unlabelled ones.
    """

    kind: Literal["correctness"] = "correctness"
    unlabelled: float = 1.0
    """How much an unlabelled image counts relative to a labelled one, at least 0; the soft loss of
    labelled images is unaffected."""

    alone: ClassVar[bool] = False  # emphasis is relative to the other images of a batch
    emphasizes: ClassVar[bool] = True
    reads_labels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.unlabelled >= 0, "unlabelled", self.unlabelled, "at least 0")

    def factors(self, log_probs_KBC: Tensor, labels_B: Tensor) -> Tensor:
        """1 / (1 + CE_k) (B, K); equal for all members if the image is unlabelled."""
        return 1 / (1 + cross_entropies(log_probs_KBC, labels_B).T)

    def emphasis(self, log_probs_KBC: Tensor, labels_B: Tensor, weights_BK: Tensor) -> Tensor:
        """The ensemble's correctness where labelled, else the members' disagreement (B,)."""
        weights_KB1 = weights_BK.T.unsqueeze(2)
        mixed_BC = torch.logsumexp(log_probs_KBC + weights_KB1.log(), dim=0)
        correct_B = 1 / (1 + cross_entropies(mixed_BC[None], labels_B)[0])
        apart_KB = (log_probs_KBC.exp() * (log_probs_KBC - mixed_BC)).sum(dim=2)
        apart_B = (weights_BK.T * apart_KB).sum(dim=0).clamp(min=0)
        return torch.where(labels_B >= 0, correct_B, apart_B)
