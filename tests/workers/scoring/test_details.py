"""Details of scores: the confusion counts and everything that follows from them."""

import numpy as np
import pytest

from workers.scoring.details import ANSWERS, DETAILS, Tally, packed, unpacked

CLASSES = ("cat", "dog", "fox", "owl")
TALLY = Tally(np.array([[3, 1, 0, 0], [2, 1, 1, 0], [0, 0, 2, 0], [0, 0, 0, 0]]), 9, np.arange(10) < 6)


def test_score_is_the_share_of_samples_whose_class_was_found() -> None:
    assert TALLY.top1 == 6 / 10


def test_details_follow_from_the_counts_and_classes_without_samples_count_in_no_mean() -> None:
    found = TALLY.details(DETAILS, CLASSES)
    assert list(found) == list(DETAILS)
    assert found["top5"] == 0.9
    assert found["mean_per_class"] == pytest.approx((3 / 4 + 1 / 4 + 1) / 3)
    assert found["per_class"] == {
        "cat": {"score": 0.75, "samples": 4}, "dog": {"score": 0.25, "samples": 4}, "fox": {"score": 1.0, "samples": 2},
    }  # fmt: skip
    assert found["confusion"] == [["dog", "cat", 2], ["cat", "dog", 1], ["dog", "fox", 1]]


def test_only_what_is_asked_for_is_given() -> None:
    assert set(TALLY.details(["confusion"], CLASSES)) == {"confusion"} and TALLY.details([], CLASSES) == {}


def test_answers_are_one_bit_a_sample_and_come_back_as_they_were() -> None:
    (answers,) = TALLY.details([ANSWERS], CLASSES)[ANSWERS]
    assert answers["samples"] == 10 and unpacked(answers).tolist() == [True] * 6 + [False] * 4
    for n in (1, 7, 8, 9, 7212):
        right = np.random.default_rng(n).random(n) < 0.3
        assert (unpacked(packed(right)) == right).all()
    with pytest.raises(ValueError, match="bits are not the answers"):
        unpacked({**packed(np.ones(9, bool)), "samples": 20})
