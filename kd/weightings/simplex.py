"""The simplex: K non-negative weights that sum to 1.

Shapes: P candidates, K members.
"""

import numpy as np


def onto_simplex(points_PK: np.ndarray) -> np.ndarray:
    """Clip each row at 0 and divide it by its sum: (P, K) -> (P, K).

    Weights can become exactly 0, which matters because optimal ensemble weights are sparse;
    Euclidean projection allows this too, but collapses whole populations onto faces.
    A row without a positive entry becomes uniform.
    """
    clipped_PK = np.clip(points_PK, 0.0, None)
    sums_P1 = clipped_PK.sum(axis=1, keepdims=True)
    uniform = 1.0 / points_PK.shape[1]
    safe_P1 = np.where(sums_P1 > 0, sums_P1, 1.0)
    normalised_PK: np.ndarray = np.minimum(clipped_PK / safe_P1, 1.0)
    return np.where(sums_P1 > 0, normalised_PK, uniform)


def from_cube(units_PK: np.ndarray) -> np.ndarray:
    """Points uniform in the unit cube -> points uniform on the simplex: (P, K) -> (P, K).

    Normalised exponentials are Dirichlet(1, ..., 1) (Devroye 1986, chapter XI.4).
    """
    return onto_simplex(-np.log(np.maximum(units_PK, np.finfo(float).tiny)))


def toward_uniform(weights_K: np.ndarray, share: float) -> np.ndarray:
    """Move `weights_K` the given share, in [0, 1], of the way to uniform weights."""
    return (1 - share) * weights_K + share / len(weights_K)
