"""Slow and obvious float64 forms of kd/evaluate.py: plain loops over Python floats."""

import math


def softmax(logits: list[float]) -> list[float]:
    largest = max(logits)
    raised = [math.exp(logit - largest) for logit in logits]
    return [value / sum(raised) for value in raised]


def predicted(logits: list[float]) -> int:
    return logits.index(max(logits))  # the first of several


def accuracy(rows: list[list[float]], labels: list[int]) -> float:
    return sum(predicted(r) == label for r, label in zip(rows, labels, strict=True)) / len(rows)


def nll(rows: list[list[float]], labels: list[int]) -> float:
    total = 0.0
    for row, label in zip(rows, labels, strict=True):
        largest = max(row)
        log_sum = largest + math.log(sum(math.exp(logit - largest) for logit in row))
        total += log_sum - row[label]
    return total / len(rows)


def ece(rows: list[list[float]], labels: list[int], bins: int = 15) -> float:
    total = 0.0
    for b in range(bins):
        inside = [
            (max(softmax(row)), predicted(row) == label)
            for row, label in zip(rows, labels, strict=True)
            if b / bins < max(softmax(row)) <= (b + 1) / bins
        ]
        if inside:
            confidence = sum(c for c, _ in inside) / len(inside)
            right = sum(r for _, r in inside) / len(inside)
            total += len(inside) / len(rows) * abs(right - confidence)
    return total


def confusion(rows: list[list[float]], labels: list[int]) -> list[list[int]]:
    counts = [[0] * len(rows[0]) for _ in rows[0]]
    for row, label in zip(rows, labels, strict=True):
        counts[label][predicted(row)] += 1
    return counts


def worst_class_accuracy(rows: list[list[float]], labels: list[int]) -> float:
    shares = []
    for label in sorted(set(labels)):
        of_class = [predicted(r) == label for r, x in zip(rows, labels, strict=True) if x == label]
        shares.append(sum(of_class) / len(of_class))
    return min(shares)


def paired_difference(a: list[float], b: list[float]) -> tuple[float, float]:
    differences = [x - y for x, y in zip(a, b, strict=True)]
    mean = sum(differences) / len(differences)
    variance = sum((d - mean) ** 2 for d in differences) / (len(differences) - 1)
    return mean, math.sqrt(variance / len(differences))
