"""The building blocks of distillation losses.

B batch, C classes.  Probabilities of labels and soft targets are over classes and sum to 1,
except for unlabelled rows of `label_probs_BC`, which are all zeros and so have no hard loss.
Losses are means over images and sums over classes, at least in float32 whatever the network's
precision.  Public code that also divides by C makes the soft term C times too weak.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(values: Tensor) -> Tensor:
    """The values in at least float32: logarithms and sums lose too much in half precision."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


@lru_cache(maxsize=64)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers as a cached tensor: sending them to a GPU at each use would make the host wait."""
    with torch.inference_mode(False):  # autograd refuses inference tensors
        return torch.tensor(values, dtype=dtype, device=device)


def log_probs(logits_BC: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-softmax over the last dimension, at `temperature`."""
    return F.log_softmax(wide(logits_BC) / temperature, dim=-1)


def rescaled(loss: Tensor, temperature: float) -> Tensor:
    """T^2 times the loss, which keeps the gradient's scale at any T (Hinton 2015, section 2)."""
    return temperature**2 * loss


def soft_losses(logits_BC: Tensor, soft_log_probs_BC: Tensor, temperature: float) -> Tensor:
    """T^2 KL(soft targets || student at T) of each image (B,), zero when equal.

    Args:
        logits_BC: The student's logits.
        soft_log_probs_BC: Log of the soft targets, which are already at `temperature`.
        temperature: T, which divides the logits.
    """
    targets_BC = wide(soft_log_probs_BC)
    log_probs_BC = log_probs(logits_BC, temperature)
    terms_BC = F.kl_div(log_probs_BC, targets_BC, log_target=True, reduction="none")
    return rescaled(terms_BC.sum(dim=1), temperature)


def soft_loss(logits_BC: Tensor, soft_log_probs_BC: Tensor, temperature: float) -> Tensor:
    """T^2 KL(soft targets || student at T), mean over images (Hinton et al., 2015, section 2.1).

    Args:
        logits_BC: The student's logits.
        soft_log_probs_BC: Log of the soft targets, which are already at `temperature`.
        temperature: T, which divides the logits; T^2 keeps the gradient's scale at any T.
    """
    return soft_losses(logits_BC, soft_log_probs_BC, temperature).mean()


def hard_loss(logits_BC: Tensor, label_probs_BC: Tensor, labelled: float = 1.0) -> Tensor:
    """Cross-entropy with the labels at T = 1, mean over the labelled images.

    The sum is divided by the expected number of labelled images in a batch, not by the actual
    one, so every label counts the same however labels fall into batches (unless gradients are
    clipped).

    Args:
        logits_BC: The student's logits.
        label_probs_BC: One row per image: one-hot, smoothed or mixed; zeros where unlabelled.
        labelled: Share of the training images that have labels, above 0.
    """
    return -(label_probs_BC * log_probs(logits_BC)).sum(dim=1).mean() / labelled


def label_probs(labels_B: Tensor, num_classes: int, smoothing: float = 0.0) -> Tensor:
    """Labels (B,), -1 where unlabelled, as probabilities (B, C); zeros where unlabelled.

    Args:
        labels_B: Class indices, or -1.
        num_classes: C.
        smoothing: Share to spread evenly over all classes (Szegedy et al., 2016, section 7).
    """
    classes_C = torch.arange(num_classes, device=labels_B.device)
    return smoothed((labels_B.unsqueeze(1) == classes_C).float(), smoothing)


def smoothed(label_probs_BC: Tensor, smoothing: float) -> Tensor:
    """The labels with a share of each spread evenly over all classes; zeros stay zeros."""
    if smoothing == 0:  # saves a GPU four kernel launches per step
        return label_probs_BC
    spread_B1 = label_probs_BC.mean(dim=1, keepdim=True)
    return (1 - smoothing) * label_probs_BC + smoothing * spread_B1
