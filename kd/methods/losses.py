"""The two terms that every distillation loss is made of.

B batch, C classes.  Probabilities of labels and soft targets are over classes and sum to 1,
but for an unlabelled row of `label_probs_BC`, which is all zeros and so has no hard loss.
Both losses are means over the batch and sums over classes, in float32 whatever the network's
precision: dividing by C as well is how the soft term becomes C times too weak in public code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_loss(logits_BC: Tensor, soft_log_probs_BC: Tensor, temperature: float) -> Tensor:
    """T^2 KL(soft targets || student at T), zero when equal (Hinton et al., 2015, section 2.1).

    Args:
        logits_BC: The student's logits.
        soft_log_probs_BC: Log of the soft targets, which are already at `temperature`.
        temperature: T, which divides the logits; T^2 keeps the gradient's scale at any T.
    """
    log_probs_BC = F.log_softmax(logits_BC.float() / temperature, dim=1)
    divergence = F.kl_div(
        log_probs_BC, soft_log_probs_BC.float(), log_target=True, reduction="batchmean"
    )
    return temperature**2 * divergence


def hard_loss(logits_BC: Tensor, label_probs_BC: Tensor) -> Tensor:
    """Cross-entropy with the labels at T = 1, mean over the whole batch.

    Args:
        logits_BC: The student's logits.
        label_probs_BC: One row per image: one-hot, smoothed or mixed; zeros where unlabelled.
            The mean counts unlabelled rows too, so that the gradient of a mixed batch is the
            gradient of the sum over all images, however labels fall into batches.
    """
    log_probs_BC = F.log_softmax(logits_BC.float(), dim=1)
    return -(label_probs_BC * log_probs_BC).sum(dim=1).mean()


def label_probs(labels_B: Tensor, num_classes: int, smoothing: float = 0.0) -> Tensor:
    """Labels (B,), -1 where unlabelled, as probabilities (B, C); zeros where unlabelled.

    Args:
        labels_B: Class indices, or -1.
        num_classes: C.
        smoothing: Share spread evenly over all classes (Szegedy et al., 2016, section 7).
    """
    labelled_B1 = (labels_B >= 0).unsqueeze(1)
    onehot_BC = F.one_hot(labels_B.clamp(min=0), num_classes).float()
    smoothed_BC = (1 - smoothing) * onehot_BC + smoothing / num_classes
    return torch.where(labelled_B1, smoothed_BC, torch.zeros_like(smoothed_BC))
