"""Thinning out at random, by rank and between thresholds that no float32 equals."""

from pathlib import Path

import numpy as np
import pytest

from merge_service.blocks.questions import Thresholds
from merge_service.errors import TechniqueError
from merge_service.techniques.thinning import bounds
from tests.merge_service.toys import Files, way


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_dare_and_della_with_equal_chances_are_the_same(files: Files) -> None:
    params = {"density": 0.5, "scale": 1}
    for rescale in ("expectation", "l1"):
        one = files.merge("dare", params | {"rescale": rescale})
        other = files.merge("della_linear", params | {"rescale": rescale, "epsilon": 0})
        for name in one:
            np.testing.assert_allclose(one[name], other[name], rtol=1e-6, atol=1e-6)


def test_rescaling_by_l1_gives_every_tensor_its_norm_back_where_anything_is_left(tmp_path: Path) -> None:
    tau = np.random.default_rng(0).standard_normal((300, 50)).astype(np.float32)
    for name in ("dare", "della_linear"):
        out = way(tmp_path, name, {"density": 0.3, "rescale": "l1", "scale": 1}, tau)
        assert 0.25 < np.count_nonzero(out) / out.size < 0.35
        assert np.abs(out).sum(dtype=float) == pytest.approx(np.abs(tau).sum(dtype=float), rel=1e-6)
        lost = [
            way(tmp_path, name, {"density": 0.2, "rescale": "l1", "scale": 1, "seed": seed}, [1.5])
            for seed in range(20)
        ]
        assert {float(one[0]) for one in lost} == {0.0, 1.5}


def test_density_one_drops_nothing_whatever_the_seed_and_epsilon(files: Files) -> None:
    expected = files.merge("task_arithmetic", {"scale": 1})
    for name in ("dare", "della_linear"):
        for rescale in ("expectation", "l1"):
            result = files.merge(name, {"density": 1, "scale": 1, "seed": 9, "rescale": rescale})
            for tensor, value in expected.items():
                assert result[tensor].tobytes() == value.tobytes(), tensor


def test_della_keeps_large_magnitudes_more_often_and_equal_ones_alike(tmp_path: Path) -> None:
    params = {"density": 0.5, "epsilon": 0.4, "scale": 1}
    rows = np.tile(np.float32([1, 2, 3, 4, 5]), (4000, 1))
    shares = np.count_nonzero(way(tmp_path, "della_linear", params, rows), axis=0) / 4000
    np.testing.assert_allclose(shares, [0.1, 0.3, 0.5, 0.7, 0.9], atol=4 * np.sqrt(0.25 / 4000))
    equal = np.ones((4000, 5), np.float32)
    kept = way(tmp_path, "della_linear", params, equal)
    np.testing.assert_allclose(np.count_nonzero(kept, axis=0) / 4000, 0.5, atol=4 * np.sqrt(0.25 / 4000))
    assert set(np.unique(kept)) == {0, 2}
    single = way(tmp_path, "della_linear", params, np.ones((4000, 1)))  # 0 / 0 in the references
    assert set(np.unique(single)) == {0, 2} and abs(np.mean(single) - 1) < 0.1


@pytest.mark.parametrize("name", ["della", "della_linear"])
def test_della_refuses_chances_outside_of_zero_to_one(name: str, files: Files) -> None:
    for params in ({"density": 0.1}, {"density": 0.15}, {"density": 0.9}):
        with pytest.raises(TechniqueError, match="lower epsilon"):
            files.merge(name, params)
    files.merge(name, {"density": 0.85})


@pytest.mark.parametrize("limit", [0.1, 1 / 3, 0.7, 1e-5, 1e-30, 0.5, np.pi])
def test_limit_that_no_float32_equals_is_the_float32_nearest_to_it_and_float64_takes_it_as_it_is(
    limit: float,
) -> None:
    near = np.float32(limit)
    for thresholds in (Thresholds(low=limit), Thresholds(high=limit)):
        low, high = bounds(thresholds, np.dtype(np.float32))
        assert low <= near <= high, "a number is within the limit that is written like it"
        less, more = np.nextafter(near, np.float32(0)), np.nextafter(near, np.float32(np.inf))
        assert (low <= less) == (thresholds.low == 0) and (more <= high) == (thresholds.high == np.inf)
        assert bounds(thresholds, np.dtype(np.float64)) == (thresholds.low, thresholds.high)
