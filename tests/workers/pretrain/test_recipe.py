"""The rule that ends the training of a base."""

import pytest
from pydantic import ValidationError

from workers.pretrain.recipe import Stopping, best, ended

RULE = Stopping(every=250, rise=0.005, patience=3, steps=3000)


@pytest.mark.parametrize(
    ("scores", "end"),
    [
        ([], False),
        ([0.5], False),
        ([0.5, 0.5, 0.5], False),
        ([0.5, 0.5, 0.5, 0.5], True),
        ([0.5, 0.504, 0.504, 0.504], True),
        ([0.5, 0.504, 0.504, 0.506], False),
        ([0.5, 0.4, 0.3, 0.6], False),
        ([0.5, 0.503, 0.506, 0.509, 0.512], False),
        ([0.5, 0.6, 0.59, 0.6, 0.604], True),
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], False),
    ],
)
def test_training_ends_after_three_checks_without_a_rise(scores: list[float], end: bool) -> None:
    assert ended(scores, RULE) is end


def test_rule_that_has_ended_training_is_not_undone_by_what_it_did_not_see() -> None:
    scores = [0.2, 0.3, 0.301, 0.302, 0.303]
    assert [ended(scores[:count], RULE) for count in range(1, 6)] == [False] * 4 + [True]


def test_kept_is_the_best_check_and_the_earliest_of_equal_ones() -> None:
    assert best([0.2, 0.4, 0.3, 0.4]) == 1
    assert best([0.1]) == 0


@pytest.mark.parametrize(
    "wrong",
    [{"every": 0}, {"rise": 0}, {"patience": 0}, {"steps": 0}, {"patence": 3}, {"rise": float("nan")}],
)
def test_rule_that_cannot_be_meant_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Stopping.model_validate(wrong)
