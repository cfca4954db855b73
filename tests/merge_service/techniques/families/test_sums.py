"""Sums of task vectors: cases in which the references of Breadcrumbs fail, and the extremes of their parameters."""

from pathlib import Path

import numpy as np
import pytest

from tests.merge_service.toys import Files, way


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_breadcrumbs_keep_something_of_tensors_and_rows_too_short_for_the_fractions(tmp_path: Path) -> None:
    tau = np.arange(1, 11)
    params = {"density": 0.6, "outliers": 0.01, "scale": 1}  # MergeKit: int(.01 * 10) = 0 loses everything
    for granularity in ("tensor", "row"):
        kept = way(tmp_path, "breadcrumbs", params | {"granularity": granularity}, tau)
        np.testing.assert_array_equal(kept, np.where(tau > 4, tau, 0))
    short = way(tmp_path, "breadcrumbs", {"density": 0.15, "scale": 1}, [[1, -3, 2], [0, 0, 0]])
    np.testing.assert_array_equal(short, [[0, -3, 0], [0, 0, 0]])  # the released code keeps int(.15 * 3) = 0


def test_breadcrumbs_of_everything_is_task_arithmetic(files: Files) -> None:
    everything = {"density": 1, "outliers": 0, "scale": 0.5}
    expected = files.merge("task_arithmetic", {"scale": 0.5})
    for granularity in ("row", "tensor", "model"):
        result = files.merge("breadcrumbs", everything | {"granularity": granularity})
        for name, value in expected.items():
            assert result[name].tobytes() == value.tobytes(), name
