"""EBKD: by the entropy of the teachers' predictions (Kwon et al., ICASSP 2020).

B batch, K members, C classes.
"""

from typing import Literal

from torch import Tensor

from kd.component import component
from kd.methods.trust.base import ByImage, fewer_shares


@component
class Entropy(ByImage):
    """(1 - H_k / sum_j H_j) / (K - 1): confident teachers count more; needs no labels."""

    kind: Literal["entropy"] = "entropy"

    def factors(self, log_probs_KBC: Tensor, labels_B: Tensor) -> Tensor:
        """(B, K); equal for all members if all of them have entropy 0."""
        entropy_KB = -(log_probs_KBC.exp() * log_probs_KBC).sum(dim=2)  # finite: never log(exp())
        share_KB = entropy_KB / entropy_KB.sum(dim=0).clamp(min=1e-30)
        return fewer_shares(share_KB)
