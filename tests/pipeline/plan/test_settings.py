"""The settings of a trajectory are written in full, for readers, and affect no fingerprint."""

from dataclasses import replace
from typing import Any

from pipeline.plan.file import decode, encode
from pipeline.plan.steps import Plan
from pipeline.results.over_time import results
from tests.pipeline.plan_toys import REPLAY, facts, make_plan, study
from tests.pipeline.results.test_results import FakeStore

NO_REPLAY = {"pretraining": 0.0, "update": 1.0, "buffer": 0.0}


def planned(*strategies: Any, **grid: Any) -> Plan:
    return make_plan(study([], grid={"strategies": list(strategies), **grid}), facts())


def settings(plan: Plan) -> list[dict[str, Any]]:
    return [plan.settings[trajectory.settings_id] for trajectory in plan.trajectories]


def test_strategy_and_its_twin_with_replay_differ_in_the_mixture_alone() -> None:
    one, other = settings(planned("continual_finetuning", "continual_finetuning_replay"))
    differing = {key for key in one if one[key] != other[key]}
    assert differing == {"recipe.mixture.pretraining", "recipe.mixture.update", "recipe.mixture.buffer"}
    assert one["recipe.lr"] == 1e-5 and one["budget.steps_per_task"] == 100


def test_every_axis_of_a_grid_is_a_setting() -> None:
    grid = {
        "recipe.lr": [1e-4, 1e-3],
        "budget.multiplier": [1, 2],
        "model.seed": [0, 1],
        "stream": [{"tasks": ["d1", "d2"]}, {"tasks": ["d2", "d1"]}],
    }
    found = settings(planned("best_in_time", **grid))
    for key in ("recipe.lr", "budget.multiplier", "model.seed", "stream.id"):
        assert len({one[key] for one in found}) == 2, key


def test_parity_is_a_setting_of_the_strategy_that_was_written_in_it() -> None:
    ties = {"init": "base", "deploy": "all", "technique": "ties"}
    ours, theirs = settings(
        planned({**ties, "name": "ours"}, {**ties, "parity": "fomo_in_flux", "name": "theirs"})
    )
    assert "strategy.parity" not in ours and theirs["strategy.parity"] == "fomo_in_flux"


def test_what_trains_nothing_has_neither_recipe_nor_budget() -> None:
    (found,) = settings(planned("zero_shot"))
    assert (
        not [key for key in found if key.startswith(("recipe.", "budget."))]
        and found["model.config"] == "toy"
    )


def test_settings_survive_the_file_and_bear_on_no_fingerprint() -> None:
    plan = planned("best_in_time", {"preset": "offline_merging", "mixture": REPLAY})
    assert decode(encode(plan)) == plan
    bare = replace(
        plan, settings={}, trajectories=tuple(replace(t, settings_id="") for t in plan.trajectories)
    )
    assert bare.fingerprint == plan.fingerprint


def test_results_have_the_settings_and_of_a_plan_without_them_the_recipe_of_its_steps() -> None:
    plan = planned({"preset": "continual_finetuning", "mixture": NO_REPLAY})
    (told,) = results(plan, FakeStore())["trajectories"]
    assert told["settings"]["recipe.mixture.update"] == 1.0 and told["arrivals"] == {
        "d1": 1,
        "d2": 2,
        "d3": 3,
    }
    old = replace(
        plan, settings={}, trajectories=tuple(replace(t, settings_id="") for t in plan.trajectories)
    )
    (told,) = results(old, FakeStore())["trajectories"]
    assert told["settings"]["recipe.mixture.update"] == 1.0 and "model.config" not in told["settings"]


def test_retrieval_sets_are_named_in_results() -> None:
    known = facts()
    datasets = {**known.datasets, "kept": replace(known.datasets["kept"], kind="retrieval")}
    plan = make_plan(study(["zero_shot"]), replace(known, datasets=datasets))
    assert results(plan, FakeStore())["retrieval"] == ["kept"]
