"""CA-MKD: by the teachers' confidence in the label (Zhang et al., ICASSP 2022, arXiv 2201.00007).

B batch, K members, C classes.
"""

from typing import ClassVar, Literal

from torch import Tensor

from kd.component import component
from kd.methods.trust.base import ByImage, cross_entropies, fewer_shares


@component
class Confidence(ByImage):
    """(1 - softmax_k(CE_k)) / (K - 1), CE_k at temperature 1; only the logit part of the paper."""

    kind: Literal["confidence"] = "confidence"

    reads_labels: ClassVar[bool] = True

    def factors(self, log_probs_KBC: Tensor, labels_B: Tensor) -> Tensor:
        """(B, K); equal for all members if the image is unlabelled."""
        return fewer_shares(cross_entropies(log_probs_KBC, labels_B).softmax(dim=0))
