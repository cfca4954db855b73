"""Grids over models, streams and other axes: which steps are shared, which are not, and what the whole grid costs."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from merge_service.timelines import time as timeline
from pipeline.errors import ConfigError
from pipeline.plan.file import decode, encode
from pipeline.plan.steps import Plan, critical_path
from pipeline.study.config import study_from
from pipeline.study.sections import key_of
from tests.pipeline.plan_toys import REPLAY, facts, make_plan, raw_study, study

ROOT = Path(__file__).parents[3]
TECHNIQUES = ["average", "task_arithmetic", "ties", "dare_ties", "breadcrumbs_ties", "magmax"]


def whole_grid(
    inits: list[str],
    deploys: list[str],
    techniques: list[str],
    budgets: list[float],
    seeds: list[int],
    tasks: int,
) -> Plan:
    raw = raw_study([{"init": inits, "deploy": deploys, "technique": techniques}], tasks)
    raw["grid"] |= {"budget.multiplier": budgets, "seed": seeds}
    return make_plan(study_from(raw).resolved(), facts(tasks))


def experts_by_time_1_8(inits: list[str], techniques: int, budgets: int, seeds: int, tasks: int) -> int:
    """Distinct trainings as in `time.md` 1.8, counted without a plan.

    With any initialization, nothing is merged before the first task, so all share that expert. Later experts are shared
    by all deployments and techniques (base, latest) or by all deployments of one technique (ema, all).
    """
    later = sum({"base": 1, "latest": 1, "ema": techniques, "all": techniques}[init] for init in inits)
    return budgets * seeds * (1 + (tasks - 1) * later)


@pytest.mark.parametrize("tasks", [1, 2, 6])
@pytest.mark.parametrize("inits", [["base"], ["latest"], ["ema"], ["base", "latest", "ema", "all"]])
def test_grid_trains_what_time_implies(inits: list[str], tasks: int) -> None:
    plan = whole_grid(inits, ["latest", "all", "ema"], TECHNIQUES[:3], [1, 2], [0, 1], tasks)
    unique = plan.summary()["steps"]["train"]["unique"]
    assert unique == experts_by_time_1_8(inits, 3, 2, 2, tasks)


def test_grid_of_288_trajectories_plans_at_once_and_trains_284_experts() -> None:
    inits, deploys = ["base", "latest", "ema", "all"], ["latest", "all", "ema"]
    plan = whole_grid(inits, deploys, TECHNIQUES, [1, 2], [0, 1], 6)
    summary = plan.summary()
    assert summary["trajectories"] == 4 * 3 * 6 * 2 * 2 == 288
    assert summary["steps"]["train"] == {
        "unique": experts_by_time_1_8(inits, 6, 2, 2, 6), "naive": 288 * 6, "cached": 0,
    }  # fmt: skip
    assert experts_by_time_1_8(inits, 6, 2, 2, 6) == 284
    assert summary["gflops_naive"] == pytest.approx(288 * 6 * 1.5 * 100 * 64 * 0.5)


def plan_of(file: str) -> Plan:
    """The plan of a study of six tasks under configs/, on invented data."""
    body = yaml.safe_load((ROOT / "configs" / file).read_text())
    body["recipe"]["lr"] = 1e-3  # YAML reads 3e-4 as text
    body["data"] = {"root": "nowhere", "pretraining": ["pool"], "held_out": ["kept"]}
    body |= {"model": {"config": "toy"}, "stream": {"tasks": [f"d{t}" for t in range(1, 7)]}}
    return make_plan(study_from(body).resolved(), facts(6))


def stated(*pages: str) -> str:
    return " ".join(word for page in pages for word in (ROOT / page).read_text().split())


def test_sweep_trains_284_experts_for_248_trajectories_of_which_no_two_serve_the_same() -> None:
    plan = plan_of("sweep.yaml")
    served = {tuple(point.evaluate for point in trajectory.points) for trajectory in plan.trajectories}
    assert len(served) == len(plan.trajectories) == 248
    assert plan.summary()["steps"]["train"] == {"unique": 284, "naive": 248 * 6, "cached": 0}
    for page in ("README.md", "docs/performance.md"):
        assert {"248", "284", "1,488"} <= {word.strip(".;") for word in stated(page).split()}, page
    assert f"{248 * 6 / 284:.1f} times fewer" in stated("docs/performance.md")


def test_demo_trains_as_many_experts_as_the_readme_says() -> None:
    train = plan_of("demo.yaml").summary()["steps"]["train"]
    said = f"plan has {train['unique']} experts where the seven strategies one by one would train {train['naive']}."
    assert said in stated("README.md")


def test_technique_added_to_a_study_adds_no_expert_of_base_and_latest() -> None:
    before = whole_grid(["base", "latest"], ["all", "ema"], TECHNIQUES[:2], [1], [0], 4)
    after = whole_grid(["base", "latest"], ["all", "ema"], TECHNIQUES[:3], [1], [0], 4)
    new = {after.steps[fp].kind for fp in after.steps.keys() - before.steps.keys()}
    assert new == {"merge", "evaluate"}


# --- models -----------------------------------------------------------------------------------------------------------------


def models(*names: str) -> list[dict[str, Any]]:
    return [{"config": name, "pretrained": f"tag-of-{name}"} for name in names]


def test_models_on_the_grid_share_nothing_and_each_has_its_base() -> None:
    raw = raw_study(["best_in_time"], 3)
    raw["grid"]["model"] = models("small", "large")
    one = study_from(raw).resolved()
    known = facts(3)
    by_name = {cell.model.config: cell.model for cell in one.cells}
    weights = {
        key_of(model): replace(known.models["any"], weights=name * 8) for name, model in by_name.items()
    }
    plan = make_plan(one, replace(known, models=weights))
    assert [t.name for t in plan.trajectories] == ["best_in_time-small", "best_in_time-large"]
    assert len(plan.bases) == 2
    for trajectory in plan.trajectories:
        used = [plan.steps[p.train] for p in trajectory.points if p.train]
        assert {step.base for step in used} == {trajectory.base}
        assert {step.model for step in used} == {trajectory.model}
    assert plan.summary()["steps"]["train"]["unique"] == 6


def test_total_of_gflops_gives_every_model_steps_of_equal_compute() -> None:
    raw = raw_study(["continual_finetuning"], 4, budget={"total_gflops": 64 * 4 * 1000.0})
    raw["grid"]["model"] = models("small", "large")
    one = study_from(raw).resolved()
    known, cost = facts(4), {"small": 0.5, "large": 2.0}
    by_model = {
        key_of(model): replace(
            known.models["any"], weights=model.config, gflops_per_sample={"all": cost[model.config]}
        )
        for model in one.models
    }
    plan = make_plan(one, replace(known, models=by_model))
    steps = {t.model: t.budget["steps_per_task"] for t in plan.trajectories}
    assert steps == {"small": 2000, "large": 500}


def test_model_only_on_the_grid_lends_the_study_its_first_value() -> None:
    raw = raw_study(["zero_shot"])
    del raw["model"]
    raw["grid"]["model"] = models("one", "two")
    assert study_from(raw).model.config == "one"


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        ({"model": [{"pretrained": "x"}]}, r"grid.model\[0\].config: is missing"),
        ({"model": [{"config": "a", "wieght": 1}]}, r"grid.model\[0\].wieght: unknown key"),
        ({"model": ["ViT-B-16"]}, r"grid.model\[0\].*must be a mapping"),
        ({"stream": [{"order": "random"}]}, r"grid.stream\[0\].*chunks"),
        ({"stream.chunks": [0]}, r"grid.stream.chunks\[0\]"),
        ({"recipe.mixture": [{"update": 0.5}]}, r"grid.recipe.mixture\[0\].*sum to 1"),
    ],
)
def test_mistake_on_an_axis_names_the_value(axis: dict[str, Any], message: str) -> None:
    raw = raw_study(["best_in_time"])
    raw["grid"] |= axis
    with pytest.raises(ConfigError, match=message):
        study_from(raw)


# --- streams ----------------------------------------------------------------------------------------------------------------


def random_study(chunks: list[int], strategies: list[Any], **more: Any) -> Plan:
    raw = raw_study(
        strategies, 3, stream={"order": "random", "chunks": chunks[0], "tasks": ["d1", "d2", "d3"]}
    )
    raw["grid"] |= {"stream.chunks": chunks, **more}
    return make_plan(study_from(raw).resolved(), facts(3))


def test_chunks_of_classes_become_tasks_whose_specs_name_classes_by_digest() -> None:
    plan = random_study([4], ["continual_finetuning_replay"])
    (trajectory,) = plan.trajectories
    assert len(trajectory.points) == 5
    learnt: list[tuple[str, str]] = []
    for point in trajectory.points[1:]:
        assert point.train is not None
        spec = plan.steps[point.train].spec
        here = [(s["dataset"], c) for s in spec["update"] for c in plan.classes[s["classes"]]]
        old = [
            (s["dataset"], c)
            for s in spec["buffer"]
            for c in (
                plan.classes[s["classes"]] if s["classes"] else [f"{s['dataset']}-{i}" for i in range(4)]
            )
        ]
        assert sorted(old) == sorted(learnt)
        learnt += here
    assert len(learnt) == len(set(learnt)) == 12


def test_number_of_tasks_is_an_axis_and_other_numbers_share_only_the_base() -> None:
    plan = random_study([2, 6], ["best_in_time"])
    assert [t.name for t in plan.trajectories] == ["best_in_time-chunks2", "best_in_time-chunks6"]
    assert [len(t.stream) for t in plan.trajectories] == [2, 6]
    first, second = ({p.train for p in t.points if p.train} for t in plan.trajectories)
    assert not first & second


def test_streams_as_whole_sections_are_named_by_what_they_are() -> None:
    raw = raw_study(["best_in_time"], 3)
    raw["grid"]["stream"] = [
        {"tasks": ["d1", "d2", "d3"]},
        {"order": "random", "chunks": 3, "seed": 1},
        {"order": "random", "chunks": 3, "seed": 1, "reverse": True},
    ]
    plan = make_plan(study_from(raw).resolved(), facts(3))
    names = [t.name for t in plan.trajectories]
    assert names[1:] == ["best_in_time-random_chunks3_seed1", "best_in_time-random_chunks3_seed1_reverse"]
    assert [t.stream for t in plan.trajectories][1] == plan.trajectories[2].stream[::-1]


def test_task_made_of_parts_has_no_score_of_its_own_and_whole_ones_do() -> None:
    parts = random_study([4], ["best_in_time"])
    assert all(point.own is None for point in parts.trajectories[0].points)
    whole = make_plan(study(["best_in_time"], 3), facts(3))
    assert all(point.own for point in whole.trajectories[0].points if point.t)


def test_orders_of_whole_datasets_share_experts_from_the_base() -> None:
    """Without replay, an expert of init base does not depend on its position in the stream."""
    raw = raw_study(["offline_merging"], 3)
    raw["recipe"]["mixture"] = {}
    raw["grid"]["stream"] = [{"tasks": list(order)} for order in itertools.permutations(["d1", "d2", "d3"])]
    plan = make_plan(study_from(raw).resolved(), facts(3))
    assert len(plan.trajectories) == 6
    assert plan.summary()["steps"]["train"]["unique"] == 3


def test_multitask_reference_has_the_summed_budget_of_its_stream() -> None:
    plan = random_study([2, 6], ["multitask"])
    steps = {plan.steps[t.points[1].train or ""].spec["steps"] for t in plan.trajectories}
    assert steps == {200, 600}
    assert [t.points[1].t for t in plan.trajectories] == [2, 6]


def test_mixtures_are_an_axis() -> None:
    raw = raw_study([{"init": "latest", "deploy": "latest"}], 2)
    raw["grid"]["recipe.mixture"] = [REPLAY, {"update": 1.0}]
    plan = make_plan(study_from(raw).resolved(), facts(2))
    assert len({t.name for t in plan.trajectories}) == 2


def test_strategy_is_checked_against_the_length_of_each_stream() -> None:
    weights = [1.0, 2.0, 3.0]
    entry = {"init": "base", "deploy": "all", "technique": "average", "params": {"weights": weights}}
    raw = raw_study([entry], 3)
    raw["data"]["adaptation"] = ["d1", "d2"]
    raw["grid"]["stream"] = [{"order": "random", "chunks": 4}]
    with pytest.raises(ConfigError, match="weights"):
        study_from(raw).resolved()


# --- cost -------------------------------------------------------------------------------------------------------------------


def test_critical_path_is_the_longest_chain_of_training() -> None:
    chain = make_plan(study(["continual_finetuning"], 5), facts(5))
    assert critical_path(chain.steps) == {"steps": 6, "train": 5, "merge": 0, "evaluate": 1}
    wide = make_plan(study(["offline_merging"], 5), facts(5))
    assert critical_path(wide.steps)["train"] == 1
    assert critical_path({}) == {"steps": 0, "train": 0, "merge": 0, "evaluate": 0}


def test_plan_with_streams_and_models_survives_json() -> None:
    plan = random_study([2, 3], ["best_in_time", "multitask"], seed=[0, 1])
    again = decode(json.loads(json.dumps(encode(plan))))
    assert again == plan and again.fingerprint == plan.fingerprint


def test_every_preset_plans_on_a_stream_of_classes() -> None:
    plan = random_study([5], list(timeline.PRESETS))
    assert len(plan.trajectories) == len(timeline.PRESETS)
