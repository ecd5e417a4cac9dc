import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from kd.weightings.simplex import from_cube, onto_simplex, toward_uniform

SHAPES = array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12)
POINTS = arrays(np.float64, SHAPES, elements=st.floats(-1e6, 1e6))


def is_on_simplex(points_PK: np.ndarray) -> bool:
    return bool(
        (points_PK >= 0).all()
        and (points_PK <= 1).all()
        and np.allclose(points_PK.sum(axis=1), 1, rtol=0, atol=1e-12)
    )


@given(POINTS)
def test_any_point_lands_on_the_simplex(points_PK):
    assert is_on_simplex(onto_simplex(points_PK))


@given(POINTS)
def test_what_is_not_positive_becomes_exactly_zero_and_ratios_stay(points_PK):
    landed_PK = onto_simplex(points_PK)
    for point, landed in zip(points_PK, landed_PK, strict=True):
        if (point > 0).any():
            assert (landed[point <= 0] == 0).all()
            np.testing.assert_allclose(
                landed, np.clip(point, 0, None) / np.clip(point, 0, None).sum(), rtol=1e-12
            )
        else:
            np.testing.assert_allclose(landed, 1 / len(point))


@given(POINTS)
def test_landing_twice_is_landing_once(points_PK):
    once_PK = onto_simplex(points_PK)
    np.testing.assert_allclose(onto_simplex(once_PK), once_PK, rtol=1e-12, atol=0)


@given(arrays(np.float64, SHAPES, elements=st.floats(0, 1)))
def test_any_point_of_the_cube_gives_weights(units_PK):
    assert is_on_simplex(from_cube(units_PK))


def test_the_cube_fills_the_simplex_evenly():
    """Dirichlet(1, 1, 1, 1): every weight has mean 1/4 and variance 3/80."""
    weights_PK = from_cube(np.random.default_rng(0).random((20_000, 4)))
    np.testing.assert_allclose(weights_PK.mean(axis=0), 1 / 4, atol=0.006)
    np.testing.assert_allclose(weights_PK.var(axis=0), 3 / 80, rtol=0.05)


@given(POINTS, st.floats(0, 1))
def test_moving_toward_uniform_stays_on_the_simplex_and_shrinks_the_range(points_PK, share):
    weights_K = onto_simplex(points_PK)[0]
    moved_K = toward_uniform(weights_K, share)
    assert is_on_simplex(moved_K[None])
    np.testing.assert_allclose(np.ptp(moved_K), (1 - share) * np.ptp(weights_K), atol=1e-12)
