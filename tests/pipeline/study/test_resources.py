"""What an expert gets: the pace of its checkpoints, and how pictures reach it."""

from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.study.sections_resources import ExpertResources


@pytest.mark.parametrize(
    ("given", "gpus", "pace"),
    [
        ("auto", 0, (50, 0.0)), ("auto", 0.5, (0, 300.0)), (0, 1, (0, 0.0)), (7, 1, (7, 0.0)), ("5min", 0, (0, 300.0)),
        ("90s", 1, (0, 90.0)), ("1.5 h", 0, (0, 5400.0)),
    ],
)  # fmt: skip
def test_checkpoints_come_every_so_many_steps_or_every_so_often(
    given: Any, gpus: float, pace: tuple[int, float]
) -> None:
    assert ExpertResources(checkpoint_every=given, gpus=gpus).checkpoint_pace == pace


@pytest.mark.parametrize("given", [-1, True, 2.5, "5", "min", "0s", "5 minutes", "-5min", "99999h", None])
def test_other_pace_is_refused_with_what_may_be_written(given: Any) -> None:
    with pytest.raises(
        ValidationError, match=r"must be auto, a number of steps .* or a time such as 90s, 5min or 1h"
    ):
        ExpertResources(checkpoint_every=given)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"gpus": 1.5}, "neither a share of one GPU nor a whole number"),
        ({"gpus": 0.5, "workers": 2}, "could put two of them on one card, which NCCL does not allow"),
    ],
)
def test_share_of_a_gpu_that_no_card_can_give_is_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        ExpertResources(**given)
    assert ExpertResources(gpus=0.25).numerics.device == "cuda"
