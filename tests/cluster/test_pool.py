"""How many groups fit, and a request that never can."""

import pytest

from cluster.pool import group_limit
from cluster.session import ClusterError, Session


def session(cpus: float, gpus: float = 0) -> Session:
    return Session("local", cpus, gpus)


@pytest.mark.parametrize(
    ("cpus", "gpus", "world", "each", "reserved", "groups"),
    [
        (2, 0, 1, (1, 0), (0, 0), 2),
        (2, 0, 2, (1, 0), (0, 0), 1),
        (2, 0, 1, (1, 0), (1, 0), 1),
        (8, 0, 1, (0.1, 0), (0, 0), 80),
        (64, 8, 2, (4, 1), (0, 1), 3),
        (64, 8, 4, (4, 0.5), (0, 0), 4),
        (2, 0, 1, (0, 0), (0, 0), 1),
    ],
)
def test_as_many_groups_as_fit_beside_what_is_reserved(
    cpus: float,
    gpus: float,
    world: int,
    each: tuple[float, float],
    reserved: tuple[float, float],
    groups: int,
) -> None:
    assert group_limit(None, session(cpus, gpus), world, *each, reserved) == groups


def test_fewer_groups_than_fit_are_what_was_asked_for() -> None:
    assert group_limit(1, session(8), 1, 1.0, 0.0, (0, 0)) == 1


@pytest.mark.parametrize(
    ("wanted", "world", "cpus", "gpus", "reserved"),
    [(None, 3, 1, 0, (0, 0)), (3, 1, 1, 0, (0, 0)), (None, 1, 1, 1, (0, 0)), (None, 1, 2, 0, (0.5, 0))],
)
def test_groups_that_can_never_have_a_place_are_refused(
    wanted: int | None, world: int, cpus: float, gpus: float, reserved: tuple[float, float]
) -> None:
    with pytest.raises(ClusterError, match="do not fit into 2 CPUs and 0 GPUs; lower") as caught:
        group_limit(wanted, session(2), world, cpus, gpus, reserved)
    assert caught.value.exit_code == 2
