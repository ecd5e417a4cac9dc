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


def standardized(logits: Row) -> Row:
    """Minus the mean, over the standard deviation with n - 1; 1e-7 keeps it defined."""
    mean = sum(logits) / len(logits)
    variance = sum((z - mean) ** 2 for z in logits) / (len(logits) - 1)
    return [(z - mean) / math.sqrt(variance + 1e-7) for z in logits]


def dkd_image(
    logits: Row, soft: Row, label: int, temperature: float, target: float, others: float
) -> float:
    """Equation 7 of the paper for one image, straight from probabilities."""
    ours = softmax(logits, temperature)
    binary = kl([soft[label], 1 - soft[label]], [ours[label], 1 - ours[label]])
    rest = [c for c in range(len(logits)) if c != label]
    theirs_rest = [soft[c] / sum(soft[d] for d in rest) for c in rest]
    ours_rest = [ours[c] / sum(ours[d] for d in rest) for c in rest]
    return temperature**2 * (target * binary + others * kl(theirs_rest, ours_rest))


def pearson(a: Row, b: Row) -> float:
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    covariance = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    spread_a = math.sqrt(sum((x - mean_a) ** 2 for x in a))
    spread_b = math.sqrt(sum((y - mean_b) ** 2 for y in b))
    return covariance / (spread_a * spread_b)


def dist_soft(
    logits: list[Row], soft: list[Row], temperature: float, inter: float, intra: float
) -> float:
    ours = [softmax(row, temperature) for row in logits]
    rows = [1 - pearson(a, b) for a, b in zip(ours, soft, strict=True)]
    columns = [
        1 - pearson([row[c] for row in ours], [row[c] for row in soft])
        for c in range(len(logits[0]))
    ]
    both = inter * sum(rows) / len(rows) + intra * sum(columns) / len(columns)
    return temperature**2 * both


def gram(rows: list[Row]) -> list[Row]:
    return [[sum(x * y for x, y in zip(a, b, strict=True)) for b in rows] for a in rows]


def mlkd_soft(
    logits: list[Row], soft: list[Row], temperature: float, images: float, classes: float
) -> float:
    """At one temperature; likeness of classes is the same of the tables turned round."""
    size = len(logits)
    ours = [softmax(row, temperature) for row in logits]
    value = sum(temperature**2 * kl(s, o) for s, o in zip(soft, ours, strict=True)) / size
    turned = [[list(column) for column in zip(*table, strict=True)] for table in (ours, soft)]
    for weight, (a, b) in ((images, (ours, soft)), (classes, turned)):
        rows = zip(gram(a), gram(b), strict=True)
        pairs = [pair for x, y in rows for pair in zip(x, y, strict=True)]
        value += weight * sum((x / size - y / size) ** 2 for x, y in pairs)
    return value


def centred_distance(logits: Row, targets: Row) -> float:
    """Half the mean squared difference, each row minus its own mean."""
    mean_a, mean_b = sum(logits) / len(logits), sum(targets) / len(targets)
    squares = [((a - mean_a) - (b - mean_b)) ** 2 for a, b in zip(logits, targets, strict=True)]
    return sum(squares) / (2 * len(logits))


def virtual_teacher_image(
    logits: Row, label: int, temperature: float, alpha: float, correct: float
) -> float:
    others = (1 - correct) / (len(logits) - 1)
    probs = [correct if c == label else others for c in range(len(logits))]
    soft = softmax([math.log(p) for p in probs], temperature)
    onehot = [1.0 if c == label else 0.0 for c in range(len(logits))]
    softened = temperature**2 * kl(soft, softmax(logits, temperature))
    return alpha * softened + (1 - alpha) * cross_entropy(onehot, softmax(logits))


def entropy(probs: Row) -> float:
    return -sum(p * math.log(p) for p in probs if p > 0)


def entropy_weights(member_logits: list[Row]) -> Row:
    """EBKD for one image."""
    entropies = [entropy(softmax(logits)) for logits in member_logits]
    return [(1 - h / sum(entropies)) / (len(entropies) - 1) for h in entropies]


def confidence_weights(member_logits: list[Row], label: int) -> Row:
    """CA-MKD for one image."""
    shares = softmax([-math.log(softmax(logits)[label]) for logits in member_logits])
    return [(1 - share) / (len(shares) - 1) for share in shares]


def correctness_weights(member_logits: list[Row], label: int) -> Row:
    """UniKD for one labelled image."""
    factors = [1 / (1 - math.log(softmax(logits)[label])) for logits in member_logits]
    return [factor / sum(factors) for factor in factors]


def disagreement(member_logits: list[Row]) -> float:
    """UniKD for one unlabelled image: Jensen-Shannon divergence of equal members."""
    probs = [softmax(logits) for logits in member_logits]
    mean = [sum(column) / len(probs) for column in zip(*probs, strict=True)]
    return sum(kl(p, mean) for p in probs) / len(probs)


def shortest(vectors: list[Row], cap: float, grid: int = 200) -> Row:
    """Weights of the shortest combination of three vectors, by trying all on a grid."""
    best, found = math.inf, []
    for i in range(grid + 1):
        for j in range(grid + 1 - i):
            weights = [i / grid, j / grid, (grid - i - j) / grid]
            if max(weights) <= cap + 1e-9:
                sums = [
                    sum(w * v for w, v in zip(weights, column, strict=True))
                    for column in zip(*vectors, strict=True)
                ]
                if (length := sum(x * x for x in sums)) < best:
                    best, found = length, weights
    return found


def cosine(a: Row, b: Row) -> float:
    length = math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / length
