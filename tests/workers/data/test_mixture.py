"""Batch indices are pure arithmetic with the counts of FoMo-in-Flux."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_service.errors import UserError
from workers.data.mixture import SOURCES, batch_counts, batch_indices, lost_shares

REPLAY = {"pretraining": 0.33, "update": 0.34, "buffer": 0.33}
PLAIN = {"pretraining": 0.0, "update": 1.0, "buffer": 0.0}
SIZES = {"pretraining": 1000, "update": 70, "buffer": 300}


def test_replay_batch_of_512_splits_as_published() -> None:
    assert batch_counts(512, REPLAY, SIZES) == {"pretraining": 169, "update": 175, "buffer": 168}


def test_first_task_without_buffer_splits_as_published() -> None:
    assert batch_counts(512, REPLAY, SIZES | {"buffer": 0}) == {
        "pretraining": 253,
        "update": 259,
        "buffer": 0,
    }


def test_plain_batch_is_all_update() -> None:
    assert batch_counts(96, PLAIN, {"update": 5}) == {"pretraining": 0, "update": 96, "buffer": 0}


def test_decimal_shares_are_not_lost_to_binary_rounding() -> None:
    assert batch_counts(100, {"pretraining": 0.29, "update": 0.42, "buffer": 0.29}, SIZES) == {
        "pretraining": 29,
        "update": 42,
        "buffer": 29,
    }


@pytest.mark.fault("F25")
@pytest.mark.parametrize(
    ("mixture", "sizes", "says"),
    [
        (REPLAY, {"update": 5, "buffer": 5}, "'pretraining', which holds no samples"),
        (PLAIN, {"update": 0}, "'update', which holds no samples"),
        ({"update": 0.5}, SIZES, "must sum to 1"),
        ({"update": 0.5, "replay": 0.5}, SIZES, "must sum to 1"),
        ({"buffer": 1.0}, {"update": 5}, "whole batch from the buffer"),
    ],
)
def test_mixture_that_cannot_be_met_is_a_user_error(
    mixture: dict[str, float], sizes: dict[str, int], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        batch_counts(32, mixture, sizes)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 600), shares=st.tuples(*[st.integers(0, 100)] * 3).filter(lambda s: s[1] > 0),
    buffer=st.booleans(),
)  # fmt: skip
def test_counts_sum_to_the_batch_and_every_source_with_a_share_has_samples(
    batch: int, shares: tuple[int, ...], buffer: bool
) -> None:
    mixture = {name: share / sum(shares) for name, share in zip(SOURCES, shares, strict=True)}
    sizes = SIZES | {"buffer": 300 * buffer}
    problem = lost_shares(batch, mixture, buffered=buffer)
    if problem is not None:
        with pytest.raises(UserError, match=f"no sample of a batch of {batch} "):
            batch_counts(batch, mixture, sizes)
        batch = int(problem.split("batch_size of ")[1])
    counts = batch_counts(batch, mixture, sizes)
    assert sum(counts.values()) == batch and min(counts.values()) >= 0
    used = {name for name in SOURCES if mixture[name] > 0 and (buffer or name != "buffer")}
    assert {name for name in SOURCES if counts[name]} == used


@pytest.mark.parametrize(
    ("batch", "shares", "buffered", "says"),
    [
        (8, (0.9, 0.05, 0.05), True, "update and buffer no sample of a batch of 8 .*batch_size of 20"),
        (16, (0.9, 0.05, 0.05), True, "buffer no sample of a batch of 16 .*batch_size of 20"),
        (2, (0.33, 0.34, 0.33), True, "buffer no sample of a batch of 2 "),
        (8, (0.95, 0.05, 0.0), False, "update no sample of a batch of 8 .*batch_size of 20"),
        (16, (0.49999999, 0.5, 0.00000001), True, "raise the share, or set it to 0"),
    ],
)
def test_share_that_comes_to_nothing_is_refused_with_the_counts_and_the_size_that_would_do(
    batch: int, shares: tuple[float, ...], buffered: bool, says: str
) -> None:
    mixture = dict(zip(SOURCES, shares, strict=True))
    with pytest.raises(UserError, match=says):
        batch_counts(batch, mixture, SIZES | {"buffer": 300 * buffered})


def test_size_that_would_do_divides_among_the_workers() -> None:
    mixture = {"pretraining": 0.9, "update": 0.05, "buffer": 0.05}
    assert str(lost_shares(12, mixture, buffered=True, multiple=6)).endswith("batch_size of 24")


def test_indices_do_not_depend_on_which_steps_were_asked_before() -> None:
    forward = [batch_indices(step, 3, 64, REPLAY, SIZES) for step in range(20)]
    backward = [batch_indices(step, 3, 64, REPLAY, SIZES) for step in reversed(range(20))]
    for one, two in zip(forward, reversed(backward), strict=True):
        assert all(np.array_equal(one[name], two[name]) for name in SOURCES)


def test_indices_differ_by_seed_and_by_source() -> None:
    one, two = batch_indices(0, 1, 64, REPLAY, SIZES), batch_indices(0, 2, 64, REPLAY, SIZES)
    assert not np.array_equal(one["update"], two["update"])
    equal = batch_indices(0, 1, 60, {"pretraining": 0.5, "update": 0.5}, {"pretraining": 500, "update": 500})
    assert not np.array_equal(equal["pretraining"], equal["update"])


def test_every_sample_is_seen_once_before_any_is_seen_twice() -> None:
    rows = np.concatenate([batch_indices(step, 9, 32, PLAIN, {"update": 70})["update"] for step in range(35)])
    for epoch in range(len(rows) // 70):
        assert sorted(rows[epoch * 70 : (epoch + 1) * 70]) == list(range(70))
    assert not np.array_equal(rows[:70], rows[70:140])


@pytest.mark.fault("F25")
def test_batch_larger_than_its_source_repeats_whole_epochs() -> None:
    rows = batch_indices(0, 9, 32, PLAIN, {"update": 10})["update"]
    assert sorted(rows[:30]) == sorted(list(range(10)) * 3)
