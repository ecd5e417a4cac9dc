"""Slow and obvious: every formula of kd/methods and kd/ensemble again, in float64 and plain loops.

Nothing is shared with the code under test, and nothing is clever: a reader can check each line
against the paper.
"""

import math

Row = list[float]


def softmax(logits: Row, temperature: float = 1.0) -> Row:
    scaled = [z / temperature for z in logits]
    top = max(scaled)
    powers = [math.exp(z - top) for z in scaled]
    return [power / sum(powers) for power in powers]


def kl(target: Row, probs: Row) -> float:
    """Sum over classes of p log(p / q), where 0 log 0 = 0."""
    return sum(p * math.log(p / q) for p, q in zip(target, probs, strict=True) if p > 0)


def cross_entropy(target: Row, probs: Row) -> float:
    return -sum(p * math.log(q) for p, q in zip(target, probs, strict=True) if p > 0)


def mixture(member_logits: list[Row], weights: Row, temperature: float) -> Row:
    """Weighted mean of the members' probabilities, for one image."""
    probs = [softmax(logits, temperature) for logits in member_logits]
    classes = range(len(member_logits[0]))
    return [sum(w * p[c] for w, p in zip(weights, probs, strict=True)) for c in classes]


def kd_loss(
    logits: list[Row], soft: list[Row], labels: list[Row], temperature: float, alpha: float
) -> float:
    """Hinton's loss: mean over images of alpha T^2 KL + (1 - alpha) CE; labels are rows too."""
    total = 0.0
    for row, target, label in zip(logits, soft, labels, strict=True):
        softened = kl(target, softmax(row, temperature))
        total += alpha * temperature**2 * softened
        total += (1 - alpha) * cross_entropy(label, softmax(row))
    return total / len(logits)


def label_row(label: int, classes: int, smoothing: float) -> Row:
    """One label as probabilities; -1 is an unlabelled image and has none."""
    if label < 0:
        return [0.0] * classes
    return [
        smoothing / classes + (1 - smoothing) * (1.0 if c == label else 0.0)
        for c in range(classes)
    ]
