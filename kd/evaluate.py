"""Metrics of a classifier, from its logits and labels; nothing is printed or stored.

Wherever a function takes *logits*, log-probabilities (an ensemble's, say) work as well, since
log-softmax leaves them unchanged.  Probabilities do not: take their logarithm.
The predicted class is that of the largest logit, and of the lowest index in a tie.
Metrics are computed in float64 whatever the logits' type; fractions lie in [0, 1].

Shapes: N samples, B samples of one batch, C classes.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from kd.component import is_out_of_memory
from kd.data import Images


@dataclass(frozen=True)
class Scores:
    """The metrics of one set of logits on one set of labelled samples."""

    accuracy: float
    """Fraction of samples whose predicted class is their label."""
    nll: float
    """Mean negative log-likelihood of the label, in nats."""
    ece: float
    """Expected calibration error over 15 bins; see `expected_calibration_error`."""
    worst_class_accuracy: float
    """The lowest accuracy of any class that has samples."""


@dataclass(frozen=True)
class Bin:
    """The samples whose confidence lies in (lower, upper]: one bar of a reliability diagram."""

    lower: float
    upper: float
    count: int
    confidence: float
    """Mean probability of the predicted class."""
    accuracy: float


def scores(logits_NC: Tensor, labels_N: Tensor) -> Scores:
    """Accuracy, NLL, calibration error and worst-class accuracy.

    Args:
        logits_NC: Logits or log-probabilities.
        labels_N: Class indices in [0, C), on the same device.

    Raises:
        ValueError: no samples, mismatched shapes, or a label outside [0, C).
    """
    _check(logits_NC, labels_N)
    log_probs_NC = logits_NC.double().log_softmax(1)
    return Scores(
        accuracy=correct(logits_NC, labels_N).double().mean().item(),
        nll=-log_probs_NC.gather(1, labels_N[:, None]).mean().item(),
        ece=expected_calibration_error(reliability(logits_NC, labels_N)),
        worst_class_accuracy=_worst_class_accuracy(confusion(logits_NC, labels_N)),
    )


def correct(logits_NC: Tensor, labels_N: Tensor) -> Tensor:
    """Which samples are classified correctly: (N,) bool."""
    return logits_NC.argmax(1) == labels_N


def agreement(logits_NC: Tensor, other_NC: Tensor) -> float:
    """Fraction of samples for which both predict the same class."""
    if logits_NC.shape != other_NC.shape or not len(logits_NC):
        raise ValueError(f"no agreement between {_shape(logits_NC)} and {_shape(other_NC)}")
    return (logits_NC.argmax(1) == other_NC.argmax(1)).double().mean().item()


def confusion(logits_NC: Tensor, labels_N: Tensor) -> Tensor:
    """How many samples of each class (row) are predicted as each class (column): (C, C) int64."""
    _check(logits_NC, labels_N)
    num_classes = logits_NC.shape[1]
    cells_N = labels_N * num_classes + logits_NC.argmax(1)
    return cells_N.bincount(minlength=num_classes**2).view(num_classes, num_classes)


def reliability(logits_NC: Tensor, labels_N: Tensor, bins: int = 15) -> tuple[Bin, ...]:
    """Confidence against accuracy in `bins` equal-width bins of confidence over (0, 1].

    Confidence is the probability of the predicted class.  Bins without samples are left out.
    """
    _check(logits_NC, labels_N)
    confidence_N = logits_NC.double().softmax(1).amax(1)
    correct_N = correct(logits_NC, labels_N).double()
    # Bin b holds (b / bins, (b + 1) / bins]: the upper edge belongs to the bin below it.
    bin_N = (confidence_N * bins).ceil().long().sub(1).clamp(0, bins - 1)
    return tuple(
        Bin(
            lower=b / bins,
            upper=(b + 1) / bins,
            count=int((bin_N == b).sum()),
            confidence=confidence_N[bin_N == b].mean().item(),
            accuracy=correct_N[bin_N == b].mean().item(),
        )
        for b in sorted(set(bin_N.tolist()))
    )


def expected_calibration_error(bins: tuple[Bin, ...]) -> float:
    """Mean over samples of |accuracy - confidence| of their bin (Guo et al. 2017, eq. 3)."""
    gaps = (bin.count * abs(bin.accuracy - bin.confidence) for bin in bins)
    return math.fsum(gaps) / sum(bin.count for bin in bins)


def paired_difference(a_N: Tensor, b_N: Tensor) -> tuple[float, float]:
    """Mean of a - b over the same samples, and its standard error.

    Pairing removes what both share (hard samples are hard for both), so this error is far
    smaller than that of two separate accuracies.

    Args:
        a_N: One number for each sample: whether it is `correct`, or its NLL.
        b_N: The same for the other classifier, with the same samples in the same order.

    Returns:
        Mean and standard error; the error is infinite for a single sample.
    """
    if a_N.shape != b_N.shape or not len(a_N):
        raise ValueError(f"cannot form pairs of {_shape(a_N)} and {_shape(b_N)}")
    difference_N = a_N.double() - b_N.double()
    mean, num_samples = difference_N.mean().item(), len(difference_N)
    if num_samples == 1:
        return mean, math.inf
    return mean, difference_N.std().item() / math.sqrt(num_samples)


def discordant(a_N: Tensor, b_N: Tensor) -> tuple[int, int]:
    """How many samples only a gets right, and how many only b.

    Args:
        a_N: Which samples the first classifier gets right, bool.
        b_N: The same for the second.
    """
    return int((a_N & ~b_N).sum()), int((b_N & ~a_N).sum())


def mcnemar(gained: int, lost: int) -> float:
    """McNemar's exact one-sided test of one classifier being better than another.

    Args:
        gained: How many samples only the one gets right.
        lost: How many only the other does.

    Returns:
        p: the chance of at least `gained` heads in `gained + lost` tosses of a fair coin.
    """
    tosses, ways, total = gained + lost, 1, 0
    for heads in range(lost + 1):  # by symmetry, the chance of at most `lost` heads; exactly
        total += ways
        ways = ways * (tosses - heads) // (heads + 1)
    return float(Fraction(total, 2**tosses))


def holm(chances: Mapping[str, float]) -> dict[str, float]:
    """Holm's correction of p for several comparisons (1979, Scandinavian Journal of Statistics 6).

    Args:
        chances: Uncorrected p of each comparison, by name.
    """
    found: dict[str, float] = {}
    least = 0.0
    for position, name in enumerate(sorted(chances, key=lambda each: chances[each])):
        least = max(least, min(1.0, (len(chances) - position) * chances[name]))
        found[name] = least
    return {name: found[name] for name in chances}


def predict(model: nn.Module, images: Images, batch_size: int | None = None) -> Tensor:
    """The model's logits for all of `images`, in their order: (N, C) float32.

    The model runs in eval mode; afterwards each module is back in its own mode.  If it runs out
    of memory, the batch size (by default `images.at_once`) is halved.
    """
    batch_size = batch_size or images.at_once
    indices_N = torch.arange(len(images))
    try:
        with _in_eval_mode(model), torch.inference_mode():
            batches = [
                model(images.batch(i, None)).float() for i in torch.split(indices_N, batch_size)
            ]
        # Joined outside of inference mode so that the caller may backpropagate.
        return torch.cat(batches)
    except RuntimeError as error:
        if batch_size == 1 or not is_out_of_memory(error):
            raise
    return predict(model, images, batch_size // 2)


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch to eval mode; afterwards restore each module's mode (some may be frozen)."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _worst_class_accuracy(counts_CC: Tensor) -> float:
    """The lowest accuracy among the classes that have samples."""
    accuracy_C = counts_CC.diagonal().double() / counts_CC.sum(1)  # nan for an empty class
    return accuracy_C.nan_to_num(nan=math.inf).min().item()


def _check(logits_NC: Tensor, labels_N: Tensor) -> None:
    if logits_NC.ndim != 2 or labels_N.shape != logits_NC.shape[:1] or not len(labels_N):
        raise ValueError(f"labels {_shape(labels_N)} do not fit logits {_shape(logits_NC)}")
    if labels_N.min() < 0 or labels_N.max() >= logits_NC.shape[1]:
        raise ValueError(
            f"labels from {int(labels_N.min())} to {int(labels_N.max())} "
            f"for {logits_NC.shape[1]} classes"
        )


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
