"""The obvious float64 way to score an ensemble, one sample and one class at a time."""

import math

import numpy as np


def softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    powers = [math.exp(value - top) for value in logits]
    return [power / sum(powers) for power in powers]


def mixed_probs(weights, logits_KNC, sample: int, mixing: str, temperature: float) -> list[float]:
    members = [[float(z) / temperature for z in logits_NC[sample]] for logits_NC in logits_KNC]
    if mixing == "probabilities":
        members = [softmax(logits) for logits in members]
    classes = range(len(members[0]))
    mixed = [sum(w * m[c] for w, m in zip(weights, members, strict=True)) for c in classes]
    return mixed if mixing == "probabilities" else softmax(mixed)


def score(
    weights, logits_KNC, labels_N, measure: str, mixing: str, temperature: float = 1.0
) -> float:
    """Mean NLL, error rate ("accuracy") or Brier score of one weighted ensemble."""
    total = 0.0
    for sample, label in enumerate(labels_N):
        probs = mixed_probs(weights, logits_KNC, sample, mixing, temperature)
        if measure == "nll":
            total -= math.log(probs[label])
        elif measure == "brier":
            total += sum((p - (c == label)) ** 2 for c, p in enumerate(probs))
        else:
            total += probs.index(max(probs)) != label
    return total / len(labels_N)


def random_logits(
    members: int, samples: int, classes: int, seed: int = 0, spread: float = 2.0
) -> tuple[np.ndarray, np.ndarray]:
    """Correlated logits of members that differ in skill, and labels."""
    rng = np.random.default_rng(seed)
    labels_N = rng.integers(classes, size=samples)
    truth_NC = np.eye(classes)[labels_N]
    shared_NC = rng.normal(size=(samples, classes))
    logits_KNC = np.stack(
        [
            (2 + member / members) * truth_NC
            + spread * 0.7 * (shared_NC + rng.normal(size=(samples, classes)))
            for member in range(members)
        ]
    )
    return logits_KNC.astype(np.float32), labels_N
