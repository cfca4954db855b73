"""Learn steps in a plan: their identity, the rights to data, their cost, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest

from merge_service.errors import TechniqueError, UserError
from merge_service.techniques import get, names
from merge_service.timelines import Strategy, check_served, learns, measured
from pipeline.errors import ConfigError, PlanError
from pipeline.kinds.specs import LearnSpec, MergeSpec
from pipeline.plan.steps import Plan, Step
from tests.pipeline.plan_toys import base_of, facts, make_plan, study

NO_REPLAY = {"pretraining": 0.0, "update": 1.0, "buffer": 0.0}
LEARNED = [one for one in names() if get(one).learned]
ADA = {"init": "base", "deploy": "all", "technique": "adamerging"}
FOLD = {**ADA, "deploy": "ema"}


def steps_of(plan: Plan, kind: str) -> list[Step]:
    return [step for step in plan.steps.values() if step.kind == kind]


def learns_of(plan: Plan) -> list[LearnSpec]:
    return [LearnSpec.of(step.spec) for step in steps_of(plan, "learn")]


def planned(*strategies: Any, **learning: Any) -> Plan:
    return make_plan(study([*strategies], learning=learning), facts())


def test_merge_reads_one_learn_step_for_all_its_experts_which_begins_with_the_one_before() -> None:
    plan = planned(ADA)
    before = ""
    for t, merge in enumerate(steps_of(plan, "merge"), start=1):
        spec = MergeSpec.of(merge.spec)
        (learned,) = set(dict(spec.statistics).values())
        step = plan.steps[learned]
        of = LearnSpec.of(step.spec)
        assert [name for name, _ in spec.statistics] == [f"t{one}" for one in range(1, t + 1)]
        assert [*of.models] == [expert for _, expert in spec.members] and of.before == before
        assert [source["dataset"] for sources in of.data for source in sources] == [
            f"d{one}" for one in range(1, t + 1)
        ]
        assert {source["split"] for sources in of.data for source in sources} == {"train"}
        assert of.to_json() == step.spec and of.inputs() == step.inputs
        assert set(step.inputs.values()) == {base_of(plan), *of.models, *([before] if before else [])}
        before = learned
    order = list(plan.steps)
    assert all(
        order.index(need) < order.index(fp)
        for fp in order
        for need in plan.steps[fp].inputs.values()
        if need in order
    )


@pytest.mark.parametrize(
    "change",
    [{"steps": 7}, {"seed": 1}, {"examples": 9}, {"start": 0.2}, {"towers": "both"}, {"warm_start": False}],
)
def test_what_bears_on_learning_is_part_of_its_fingerprint_and_of_no_expert(change) -> None:
    plans = [planned(ADA), planned(ADA, **change)]
    found = [{step.fingerprint for step in steps_of(plan, "learn")} for plan in plans]
    experts = [{step.fingerprint for step in steps_of(plan, "train")} for plan in plans]
    assert experts[0] == experts[1] and len(found[0]) == len(found[1]) == 3
    assert len(found[0] & found[1]) == ("warm_start" in change)  # the first merge has none before it


def test_parameters_that_bear_on_the_merge_alone_share_what_is_learned() -> None:
    plan = planned(
        *({**ADA, "params": params} for params in ({}, {"logit_scale": "merge"}, {"density": 0.5}))
    )
    assert len(steps_of(plan, "learn")) == 3 and len(steps_of(plan, "merge")) == 9
    (trimmed, *_) = learns_of(planned({**ADA, "params": {"trim": True, "density": 0.5}}))
    assert (trimmed.params["trim"], trimmed.params["density"]) == (True, 0.5)
    mask = {**ADA, "technique": "concrete", "params": {"scale": 0.4, "temperature": 0.7}}
    (spec, *_) = learns_of(planned(mask, safe=True))
    assert (spec.method, spec.params["start"], spec.params["temperature"]) == ("concrete_safe", 0.4, 0.7)


def test_merge_of_all_takes_a_buffer_and_a_fold_learns_from_the_new_task_without() -> None:
    with pytest.raises(ConfigError, match=r"adamerging learns a merge of all experts .* allows no old data"):
        study([{**ADA, "mixture": NO_REPLAY}])
    for mixture, tasks in ((NO_REPLAY, [1, 1, 1]), (None, [1, 2, 3])):
        strategy = {**FOLD, **({"mixture": mixture} if mixture else {})}
        found = learns_of(planned(strategy))
        assert [len(one.data) for one in found] == tasks and [len(one.models) for one in found] == [2, 2, 2]
        assert [one.data[-1][0]["dataset"] for one in found] == ["d1", "d2", "d3"]
        assert all(one.params["fold"] and one.before == "" for one in found)


@pytest.mark.parametrize("technique", LEARNED)
@pytest.mark.parametrize("deploy", ["all", "ema"])
def test_technique_is_planned_in_every_form_that_it_has_and_refused_in_others(technique, deploy) -> None:
    strategy = {**ADA, "technique": technique, "deploy": deploy}
    if deploy == "ema" and technique != "adamerging":
        with pytest.raises(UserError, match=r"has no fold form|no way to learn a fold"):
            planned(strategy)
        return
    plan = planned(strategy)
    assert len(steps_of(plan, "learn")) == len(steps_of(plan, "merge")) == 3
    assert {one.method for one in learns_of(plan)} == {technique}


@pytest.mark.parametrize(
    ("strategy", "learning", "text"),
    [
        (ADA, {"similarity": 0.1}, "learning.similarity: has no effect with adamerging"),
        (ADA, {"safe": True}, "learning.safe: has no effect"),
        (FOLD, {"warm_start": False}, "learning.warm_start: has no effect"),
        ({**ADA, "technique": "concrete"}, {"start": 0.2}, "learning.start: has no effect with concrete"),
        ({**ADA, "params": {"adapted_on": "test"}}, {}, "a study learns on training splits"),
    ],
)
def test_key_without_effect_and_test_images_are_refused(strategy, learning, text) -> None:
    with pytest.raises(ConfigError, match=text):
        study([strategy], learning=learning)


def test_what_cannot_be_learned_is_refused_by_the_plan() -> None:
    trimmed = {**ADA, "params": {"trim": True, "granularity": "tensor"}}
    with pytest.raises(PlanError, match="learning trims over the whole model"):
        planned(trimmed)
    with pytest.raises(UserError, match="towers = 'both' is not image"):
        planned({**ADA, "technique": "tinting"}, towers="both")
    known = facts()
    captions = {**known.datasets, "d2": replace(known.datasets["d2"], kind="retrieval")}
    with pytest.raises(PlanError, match="task d2: adamerging learns from class scores"):
        make_plan(study([ADA]), replace(known, datasets=captions))


def test_cost_is_charged_once_in_the_plan_and_to_every_trajectory_one_by_one() -> None:
    other = {**ADA, "params": {"logit_scale": "merge"}}
    plan = planned(ADA, other, steps=10)
    experts, learning = 3 * 0.5 * 64 * 100, (1 + 2 + 3) * 0.5 * 16 * 10
    summary = plan.summary()
    assert summary["gflops"] == pytest.approx(experts + learning)
    assert summary["gflops_learning"] == pytest.approx(learning) and "gflops_measuring" not in summary
    assert plan.naive_gflops == pytest.approx(2 * (experts + learning)) and plan.naive["learn"] == 6
    assert make_plan(study([ADA]), facts(gflops_per_sample={})).summary()["gflops"] is None


def test_study_without_learned_merges_is_planned_as_before_and_not_multiplied() -> None:
    plain = make_plan(study(["best_in_time"]), facts())
    assert "learn" not in plain.summary()["steps"] and "gflops_learning" not in plain.summary()
    axis = {"strategies": [ADA, "best_in_time"], "learning.steps": [5, 9]}
    found = study([], grid=axis)
    assert len(found.cells) == 3
    assert {one.params["steps"] for one in learns_of(make_plan(found, facts()))} == {5, 9}


def test_service_refuses_what_must_be_learned() -> None:
    strategy = Strategy("base", "all", "adamerging")
    assert learns(strategy) and measured(strategy) == () and not learns(Strategy("latest", "latest"))
    with pytest.raises(TechniqueError, match="must be learned for the experts of every t"):
        check_served(strategy)
