"""How a student learns from soft targets and labels.

A method has a `temperature` and `loss(logits_BC, soft_log_probs_BC, label_probs_BC)`; it sees
tensors, never models.  One file each, and one word here: the union is the registry.
"""

from kd.methods.kd import KD
from kd.methods.losses import hard_loss, label_probs, soft_loss

Method = KD

__all__ = ["KD", "Method", "hard_loss", "label_probs", "soft_loss"]
