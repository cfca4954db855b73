"""Workers that die while they measure or learn: the study gives the same statistics, coefficients and merges."""

from pathlib import Path

import pytest

from tests.faults.harness import Faults, must_be_same, run
from tests.world import Cluster, World

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.chaos]

POINTS = {"measure.start": 2, "learn.start": 1, "learn.after_step": 55, "learn.after_ckpt": 1}
"""Point: at which passing the worker is killed. Learning is kept every 50 steps, so 55 is beyond its first checkpoint."""


def seeing(world: World) -> Path:
    """A study that measures two experts and learns a merge of them."""
    return world.study(
        name="seeing",
        grid={"strategies": [{"init": "base", "deploy": "all", "technique": ["regmean", "adamerging"]}]},
        statistics={"examples": 8},
        learning={"steps": 60, "batch_size": 2, "examples": 8},
    )


@pytest.fixture(scope="module")
def undisturbed_seeing(world: World, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT of a run without faults."""
    out = tmp_path_factory.mktemp("seeing") / "out"
    answer = run(seeing(world), out, cluster)
    assert answer.returncode == 0, answer.stderr
    return out


@pytest.mark.fault("F2")
@pytest.mark.parametrize("point", POINTS)
def test_worker_killed_while_it_measures_or_learns_is_replaced_and_nothing_differs(
    point: str, world: World, cluster: Cluster, undisturbed_seeing: Path, tmp_path: Path
) -> None:
    answer = run(seeing(world), tmp_path / "out", cluster, Faults(tmp_path).at(point, nth=POINTS[point]))
    assert answer.returncode == 0, answer.stderr
    assert "trying again" in answer.stderr
    must_be_same(tmp_path / "out", undisturbed_seeing, cluster)
