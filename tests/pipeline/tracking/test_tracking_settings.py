"""The tracker records every setting of a trajectory."""

from pathlib import Path

from tests.pipeline.tracked_study import finished_study


def test_twins_that_differ_in_replay_alone_differ_in_the_parameters_of_the_mixture_alone(
    tmp_path: Path,
) -> None:
    tracked = finished_study(tmp_path, strategies=("continual_finetuning", "continual_finetuning_replay"))
    rows = [row.payload for row in tracked.projection().started(0)]
    one, other = [row["params"] for row in rows if row.get("run", "").startswith("trajectory/")]
    assert {key for key in one | other if one.get(key) != other.get(key)} == {
        "recipe.mixture.pretraining", "recipe.mixture.update", "recipe.mixture.buffer",
    }  # fmt: skip
    for key in ("recipe.lr", "model.config", "stream.order", "budget.steps_per_task", "seed"):
        assert key in one
