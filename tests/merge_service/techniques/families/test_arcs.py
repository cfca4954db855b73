"""Merges along arcs, compared with the same computation on whole vectors, and with golden numbers."""

import math
from functools import partial

import numpy as np
import pytest
from numpy.testing import assert_allclose

from merge_service.errors import TechniqueError
from merge_service.techniques.families import arcs
from tests.merge_service.arrows import BASE, TAUS, TRIANGLE, unit

nuslerp, multislerp, karcher = (partial(one, xp=np) for one in (arcs.nuslerp, arcs.multislerp, arcs.karcher))
MEANS = {"multislerp": multislerp, "karcher": karcher}
all_means = pytest.mark.parametrize("mean", MEANS.values(), ids=MEANS.keys())


def vectors(n: int, size: int = 40, seed: int = 0) -> np.ndarray:
    """Random vectors of different lengths with angles well below and above a right one."""
    draw = np.random.default_rng(seed)
    return (draw.standard_normal((n, size)) + 0.3) * draw.uniform(0.5, 3, (n, 1))


def merged(mean, rows: np.ndarray, weights=None) -> np.ndarray:
    """The result of applying the coefficients."""
    found = mean(rows @ rows.T, weights, "w")
    shares = np.ones(len(rows)) if weights is None else np.asarray(weights, float)
    return (shares / shares.sum() if found is None else np.array(found)) @ rows


def slerp(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    angle = math.acos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def direct_multislerp(rows: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Mean direction, tangent vectors there, exponential map of their mean, mean norm: each as vectors."""
    units = np.array([unit(row) for row in rows])
    mean = unit(shares @ units)
    tangent = shares @ np.array([u - (u @ mean) * mean for u in units])
    length = np.linalg.norm(tangent) + 1e-300
    direction = math.cos(length) * mean + math.sin(length) / length * tangent
    return (shares @ np.linalg.norm(rows, axis=1)) * direction


def direct_karcher(rows: np.ndarray, shares: np.ndarray, iterations: int) -> np.ndarray:
    units = np.array([unit(row) for row in rows])
    mean = unit(shares @ units)
    for _ in range(iterations):
        tangent = np.zeros_like(mean)
        for share, u in zip(shares, units):
            angle = math.acos(u @ mean)
            tangent += share * angle / math.sin(angle) * (u - (u @ mean) * mean)
        length = np.linalg.norm(tangent)
        mean = math.cos(length) * mean + math.sin(length) / length * tangent
    return (shares @ np.linalg.norm(rows, axis=1)) * mean


@pytest.mark.parametrize(
    ("t", "expected"),
    [
        (
            0.25,
            "1.463924 -1.254655 2.265643 1.568079 -0.865582 2.440034 0.482402 -3.42745 1.118329 -0.796306",
        ),
        (0.5, "1.365345 -0.955742 2.184552 0.819207 -0.819207 2.525888 0.819207 -3.208561 1.12641 -1.433612"),
    ],
)
def test_nuslerp_of_weights_gives_the_golden_slerp(t: float, expected: str) -> None:
    rows = BASE + TAUS[:2]
    result = np.array(nuslerp(rows @ rows.T, t)) @ rows
    assert_allclose(result, np.array(expected.split(), float), rtol=0, atol=1e-6)


def test_nuslerp_at_its_ends_gives_the_vectors_themselves() -> None:
    gram = vectors(2) @ vectors(2).T
    assert nuslerp(gram, 0) == [1.0, 0.0]
    assert nuslerp(gram, 1) == [0.0, 1.0]


def test_nuslerp_bends_where_slerp_of_weights_no_longer_does() -> None:
    rows = np.array([[1, 0], [math.cos(0.01), math.sin(0.01)]])
    assert_allclose(sum(nuslerp(rows @ rows.T, 0.5)), 1 / math.cos(0.005), rtol=1e-12)


@pytest.mark.parametrize(
    "rows",
    [
        [[1, 2], [1, 2]],
        [[1, 2], [3, 6]],
        [[1, 2], [-1.5, -3]],
        [[0, 0], [1, 2]],
        [[0, 0], [0, 0]],
        [[3], [-2]],
    ],
    ids=["equal", "parallel", "antiparallel", "one zero", "both zero", "one element"],
)
def test_two_vectors_without_an_arc_take_the_straight_line(rows: list) -> None:
    gram = np.array(rows, float) @ np.array(rows, float).T
    assert nuslerp(gram, 0.3) is None
    assert multislerp(gram, [0.7, 0.3], "w") is None
    assert karcher(gram, [0.7, 0.3], "w") is None


@pytest.mark.parametrize("scale", [1e-6, 1, 1e6])
def test_antiparallel_vectors_with_float32_rounding_take_the_straight_line(scale: float) -> None:
    first = vectors(1, 3000)[0].astype(np.float32)
    second = (np.float32(-1.3) * first).astype(np.float32)
    rows = np.array([first, second], float) * scale
    assert nuslerp(rows @ rows.T, 0.5) is None
    assert karcher(rows @ rows.T, None, "w") is None


some_weights = pytest.mark.parametrize("weights", [None, [4, 1, 2, 0.5]], ids=["equal", "unequal"])


def normal(weights: list | None) -> np.ndarray:
    return np.array(weights or [1, 1, 1, 1]) / sum(weights or [1, 1, 1, 1])


@some_weights
def test_multislerp_equals_the_one_of_whole_vectors(weights: list | None) -> None:
    rows = vectors(4)
    assert_allclose(merged(multislerp, rows, weights), direct_multislerp(rows, normal(weights)), rtol=1e-9)


@some_weights
@pytest.mark.parametrize("iterations", [0, 1, 10])
def test_karcher_equals_the_one_of_whole_vectors(weights: list | None, iterations: int) -> None:
    rows = vectors(4)
    found = np.array(karcher(rows @ rows.T, weights, "w", iterations, tolerance=0)) @ rows
    assert_allclose(found, direct_karcher(rows, normal(weights), iterations), rtol=1e-9, atol=1e-12)


def test_karcher_stops_at_steps_below_the_tolerance() -> None:
    gram = vectors(4) @ vectors(4).T
    at_once = karcher(gram, None, "w", 10, tolerance=10)
    assert at_once == multislerp(gram, None, "w")
    assert at_once != karcher(gram, None, "w")


def test_karcher_without_a_tolerance_stops_when_nothing_moves() -> None:
    rows = np.float64([[1, 0], [0, 1]])
    assert_allclose(karcher(rows @ rows.T, None, "w", 10, tolerance=0), [0.5**0.5] * 2)


@all_means
def test_mean_of_equal_vectors_is_that_vector(mean) -> None:
    rows = np.repeat(vectors(1), 5, axis=0)
    assert mean(rows @ rows.T, None, "w") is None


@all_means
def test_mean_of_two_halfway_is_slerp_of_directions_times_mean_norm(mean) -> None:
    rows = vectors(2)
    length = np.linalg.norm(rows, axis=1).mean()
    expected = slerp(unit(rows[0]), unit(rows[1]), 0.5) * length
    assert_allclose(merged(mean, rows), expected, rtol=1e-9)


def test_karcher_of_two_is_slerp_of_directions_at_any_weight() -> None:
    rows = vectors(2)
    length = np.array([0.7, 0.3]) @ np.linalg.norm(rows, axis=1)
    expected = slerp(unit(rows[0]), unit(rows[1]), 0.3) * length
    assert_allclose(merged(karcher, rows, [0.7, 0.3]), expected, rtol=1e-4)


@all_means
def test_length_is_the_weighted_mean_norm_and_order_and_scale_do_not_matter(mean) -> None:
    rows, weights = vectors(5), np.array([1, 2, 3, 4, 5.0])
    result = merged(mean, rows, weights)
    norms = np.linalg.norm(rows, axis=1)
    assert_allclose(np.linalg.norm(result), weights @ norms / 15, rtol=1e-12)
    assert_allclose(merged(mean, rows[::-1], weights[::-1]), result, rtol=1e-9, atol=1e-12)
    assert_allclose(merged(mean, rows * 1e-9, weights) * 1e9, result, rtol=1e-9, atol=1e-12)
    assert_allclose(merged(mean, -rows, weights), -result, rtol=1e-12)


@all_means
def test_zero_vector_only_shortens_the_mean(mean) -> None:
    rows = np.vstack([vectors(3), np.zeros(40)])
    assert_allclose(merged(mean, rows), merged(mean, rows[:3]) * 0.75, rtol=1e-12)


@all_means
def test_expert_of_no_weight_does_not_matter(mean) -> None:
    rows = vectors(4)
    assert_allclose(merged(mean, rows, [1, 0, 2, 1]), merged(mean, rows[[0, 2, 3]], [1, 2, 1]), rtol=1e-12)
    assert mean(rows @ rows.T, [0, 0, 3, 0], "w") is None


@all_means
def test_one_expert_or_only_zeros_take_the_straight_line(mean) -> None:
    assert mean(np.array([[4.0]]), None, "w") is None
    assert mean(np.zeros((3, 3)), None, "w") is None


@all_means
def test_directions_that_cancel_out_are_refused_by_name(mean) -> None:
    with pytest.raises(TechniqueError, match="of w:"):
        mean(TRIANGLE @ TRIANGLE.T, None, "w")
    assert mean(TRIANGLE @ TRIANGLE.T, [2, 1, 1], "w") is not None


@all_means
def test_weights_that_do_not_fit_are_refused(mean) -> None:
    with pytest.raises(TechniqueError, match="2 entries but there are 3"):
        mean(np.eye(3), [1, 1], "w")
    with pytest.raises(TechniqueError, match="add up to 0"):
        mean(np.eye(2), [0, 0], "w")


def test_karcher_survives_a_vector_opposite_to_the_mean() -> None:
    rows = np.array([[-1, 0, 0], [0.8, 0.6, 0], [0.8, -0.6, 0], [0.8, 0, 0.6], [0.8, 0, -0.6]])
    result = merged(karcher, rows)
    assert_allclose(unit(result), [1, 0, 0], atol=1e-9)
