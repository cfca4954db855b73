"""The arithmetic of nodes, shapes and shares."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.capacity import Capacity, Node, Shape, Share


def capacity(*nodes: tuple[float, float]) -> Capacity:
    return Capacity(Node(f"n{number}", f"10.0.0.{number}", *node) for number, node in enumerate(nodes))


def fill(capacity: Capacity, shape: Shape) -> list[Share]:
    shares = []
    while (share := capacity.take(shape)) is not None:
        shares.append(share)
    return shares


@pytest.mark.parametrize(
    ("nodes", "shape", "groups"),
    [
        ([(2, 0)], Shape(), 2),
        ([(2, 0)], Shape(2), 1),
        ([(8, 0)], Shape(cpus=0.1), 80),
        ([(64, 8)], Shape(2, 4, 1), 4),
        ([(64, 8)], Shape(4, 4, 0.5), 4),
        ([(64, 4)], Shape(1, 1, 0.6), 4),  # a share of a GPU is of one GPU
        ([(2, 1), (2, 1)], Shape(1, 1, 2), 0),  # whole GPUs of one member are on one node
        ([(2, 1), (2, 1)], Shape(2, 1, 1), 1),
        ([(3, 0), (3, 0)], Shape(1, 2), 2),  # not three: a member is on one node
        ([(4, 2), (8, 4)], Shape(1, 1, 2), 3),
    ],
)
def test_as_many_groups_as_every_node_has_place_for(nodes: list, shape: Shape, groups: int) -> None:
    assert len(fill(capacity(*nodes), shape)) == groups


def test_group_is_packed_on_as_few_nodes_as_hold_it() -> None:
    share = capacity((2, 0), (8, 0), (2, 0)).take(Shape(4))
    assert share is not None and share.nodes == ["n1"] * 4


def test_small_groups_fill_the_fullest_node_so_that_a_large_one_still_fits() -> None:
    place = capacity((4, 4), (4, 4))
    for _ in range(4):
        assert place.take(Shape(1, 1, 1)) is not None
    assert place.take(Shape(1, 1, 4)) is not None


def test_avoided_nodes_are_not_taken() -> None:
    place = capacity((1, 0), (1, 0))
    share = place.take(Shape(), avoid={"n0"})
    assert share is not None and share.nodes == ["n1"]
    assert place.take(Shape(), avoid={"n0"}) is None


def test_reserved_nodes_are_those_nearest_to_being_free() -> None:
    place = capacity((1, 4), (4, 2), (4, 4))
    assert place.reserved_for(Shape(1, 1, 4)) <= {"n0", "n2"}
    for _ in range(3):
        place.take(Shape(1, 1, 1), avoid={"n0", "n1"})
    assert place.reserved_for(Shape(1, 1, 4)) == {"n0"}
    assert place.reserved_for(Shape(2, 4, 0)) == {"n1", "n2"}


@pytest.mark.parametrize(
    ("nodes", "shape", "why"),
    [
        ([(2, 0)], Shape(3), "only 2 of the 3 fit"),
        ([(2, 0)], Shape(1, 4), "no node can hold one of them; the largest is 10.0.0.0 with 2 CPUs and 0 GPUs"),
        ([(8, 1), (8, 2)], Shape(1, 1, 4), "the largest is 10.0.0.1 with 8 CPUs and 2 GPUs"),
        ([], Shape(), "there is no node"),
    ],
)  # fmt: skip
def test_what_can_never_have_a_place_says_why(nodes: list, shape: Shape, why: str) -> None:
    assert why in capacity(*nodes).lacking(shape) and not capacity(*nodes).could_hold(shape)
    assert str(capacity((2, 0), (4, 1))).startswith("6 CPUs and 1 GPUs (10.0.0.0 with 2 CPUs and 0 GPUs, ")


def test_node_that_has_gone_takes_its_shares_along_and_a_new_one_is_room() -> None:
    place = capacity((1, 0))
    share = place.take(Shape())
    assert share is not None and place.take(Shape()) is None
    place.update([Node("new", "10.0.0.9", 2)])
    place.give(share)
    assert len(fill(place, Shape())) == 2


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_nothing_is_given_twice_and_all_of_it_comes_back(seed: int) -> None:
    rng = random.Random(seed)
    nodes = [(rng.randint(1, 8), rng.randint(0, 4)) for _ in range(rng.randint(1, 4))]
    place, taken = capacity(*nodes), []
    for _ in range(60):
        if taken and rng.random() < 0.4:
            place.give(taken.pop(rng.randrange(len(taken))))
            continue
        shape = Shape(rng.randint(1, 3), rng.choice([0.5, 1, 2]), rng.choice([0, 0, 0.25, 0.5, 1, 2]))
        could = place.fits_beside(shape, [])
        share = place.take(shape)
        assert (share is not None) == could and (share is None or len(share.nodes) == shape.world)
        taken += [share] if share is not None else []
        for name, node in place.nodes.items():
            held = [(one.shape, places) for one in taken for on, places in one.places if on == name]
            assert sum(shape.cpus for shape, _ in held) <= node.cpus + 1e-6
            for device in range(int(node.gpus)):
                assert sum(min(shape.gpus, 1) for shape, places in held if device in places) <= 1 + 1e-6
    for share in taken:
        place.give(share)
    assert len(fill(place, Shape(1, 1, 1))) == len(fill(capacity(*nodes), Shape(1, 1, 1)))
