"""One or a few experts per element: which are chosen."""

from pathlib import Path

import numpy as np
import pytest

from merge_service.errors import TechniqueError
from merge_service.merge import merge
from tests.merge_service import toys
from tests.merge_service.toys import Files, way


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_consensus_goes_from_the_sum_to_the_base_as_more_must_agree(files: Files) -> None:
    expected = files.merge("task_arithmetic", {"scale": 1})
    nobody = files.merge("consensus", {"min_tasks": 0, "scale": 1})
    many = files.merge("consensus", {"min_tasks": 3, "scale": 1})
    for name, value in expected.items():
        np.testing.assert_array_equal(nobody[name], value)
        assert many[name].tobytes() == files.base[name].tobytes()
    merge("consensus", {"min_tasks": 1, "scale": 1}, files.start, files.paths[:1], files.out)
    alone = toys.load(files.out)
    for name in alone:
        np.testing.assert_array_equal(alone[name], files.experts[0][name])


def test_random_mix_takes_every_expert_alike_and_a_new_one_changes_only_what_it_wins(tmp_path: Path) -> None:
    taus = [np.full(30_000, value, np.float32) for value in (1, 2, 4)]
    before, after = (way(tmp_path, "random_mix", {}, *taus[:count]) for count in (2, 3))
    for value in (1, 2, 4):
        assert abs(np.mean(after == value) - 1 / 3) < 4 * np.sqrt(2 / 9 / 30_000)
    np.testing.assert_array_equal(after[after != 4], before[after != 4])


def test_ram_averages_over_those_that_moved_further_than_the_threshold(tmp_path: Path) -> None:
    taus = [1, 0.25, 0.1, -0.5], [0, 0.25, 0.2, 1]
    np.testing.assert_array_equal(
        way(tmp_path, "ram", {"threshold": 0.2}, *taus), toys.vector([1, 0.25, 0, 0.25])
    )
    np.testing.assert_array_equal(
        way(tmp_path, "ram", {"threshold": 0.19}, *taus), toys.vector([1, 0.25, 0.2, 0.25])
    )


def test_nearswap_moves_no_weight_further_than_the_threshold_and_arrives_within_it(files: Files) -> None:
    result = files.merge("nearswap", {"threshold": 0.5})
    for name in result.keys() - {"position_ids", "visual.mask", "logit_scale"}:
        running, new = files.experts[0][name], files.experts[1][name]
        near = np.abs(new - running) <= 0.5
        np.testing.assert_array_equal(result[name][near], new[near])
        np.testing.assert_array_equal(np.abs(result[name] - running)[~near], 0.5)
    with pytest.raises(TechniqueError, match="exactly 2"):
        merge("nearswap", {}, files.start, files.paths[:1], files.out)
