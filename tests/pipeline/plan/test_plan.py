"""The plan: which steps are shared, which are not, and what enters their identity."""

import json
import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import PlanError
from pipeline.plan.file import decode, encode
from pipeline.plan.planner import base_step, steps_per_task
from pipeline.plan.steps import DatasetFacts, Plan
from pipeline.study.config import study_from
from pipeline.study.sections import BudgetSection
from tests.pipeline.plan_toys import base_of, facts, make_plan, raw_study, study

TECHNIQUES = ["average", "task_arithmetic", "ties", "dare_ties", "breadcrumbs_ties", "magmax"]


def plan_of(strategies: list[Any], tasks: int = 3, **changes: Any) -> Plan:
    return make_plan(study(strategies, tasks, **changes), facts())


def count(plan: Plan, kind: str) -> int:
    return sum(step.kind == kind for step in plan.steps.values())


def of_kind(plan: Plan, kind: str) -> set[str]:
    return {fp for fp, step in plan.steps.items() if step.kind == kind}


# --- an independent account of what TIME makes one trains and merges: formulas as nested text -----------------------------


def start(init: str, technique: str, seed: str, t: int) -> str:
    if t == 1 or init == "base":
        return "base"
    return weights(init, init, technique, seed, t - 1)


def expert(init: str, technique: str, seed: str, t: int) -> str:
    return f"train(d{t}, {start(init, technique, seed, t)})"


def weights(policy: str, init: str, technique: str, seed: str, t: int) -> str:
    """The weights of `policy` after t tasks of a trajectory whose experts start by `init`."""
    if policy == "latest":
        return expert(init, technique, seed, t)
    if policy == "all":
        return f"{technique}[{', '.join(expert(init, technique, seed, i) for i in range(1, t + 1))}]"
    running = "base"
    for i in range(1, t + 1):
        new = expert(init, technique, seed, i)
        running = new if i == 1 and seed == "first_expert" else f"{technique}-fold({running}, {new})"
    return running


def account(strategies: list[tuple[str, str, str, str]], tasks: int) -> tuple[set[str], set[str], set[str]]:
    """(experts, merges, deployed) of all strategies together, as text."""
    experts, merges, deployed = set(), set(), {"base"}
    for init, deploy, technique, seed in strategies:
        for t in range(1, tasks + 1):
            experts.add(expert(init, technique, seed, t))
            deployed.add(weights(deploy, init, technique, seed, t))
            if deploy in ("all", "ema"):
                merges.add(weights(deploy, init, technique, seed, t))
            if init in ("all", "ema") and t < tasks:
                merges.add(weights(init, init, technique, seed, t))
            if "ema" in (init, deploy) and (deploy == "ema" or t < tasks):
                merges.add(weights("ema", init, technique, seed, t))
    return experts, {merge for merge in merges if not merge.startswith("train")}, deployed


strategy = st.tuples(
    st.sampled_from(["base", "latest", "all", "ema"]),
    st.sampled_from(["latest", "all", "ema"]),
    st.sampled_from(["average", "ties", "magmax"]),
    st.sampled_from(["base", "first_expert"]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(strategy, min_size=1, max_size=8, unique=True), st.integers(1, 4), st.integers(1, 2))
def test_unique_steps_are_those_that_time_implies(
    strategies: list[tuple[str, str, str, str]], tasks: int, seeds: int
) -> None:
    entries = [
        {"name": f"s{i}", "init": init, "deploy": deploy, "technique": technique, "ema_seed": seed}
        for i, (init, deploy, technique, seed) in enumerate(strategies)
    ]
    raw = raw_study(entries, tasks)
    raw["grid"]["seed"] = list(range(seeds))
    plan = make_plan(study_from(raw).resolved(), facts())
    experts, merges, deployed = account(strategies, tasks)
    assert count(plan, "train") == seeds * len(experts)
    assert count(plan, "merge") == seeds * len(merges)
    scored = 1 + seeds * (len(deployed - {"base"}) + len(experts - deployed))
    assert count(plan, "evaluate") == scored
    naive = [account([one], tasks) for one in strategies]
    assert plan.naive["train"] == seeds * sum(len(each[0]) for each in naive)
    assert plan.naive["merge"] == seeds * sum(len(each[1]) for each in naive)
    assert plan.naive["evaluate"] == seeds * sum(len(each[2] | each[0]) for each in naive)


def test_whole_grid_shares_as_the_closed_formula_says_and_plans_quickly() -> None:
    tasks, techniques, budgets, seeds = 6, len(TECHNIQUES), 2, 2
    raw = raw_study(
        [
            {
                "init": ["base", "latest", "ema", "all"],
                "deploy": ["latest", "all", "ema"],
                "technique": TECHNIQUES,
            }
        ],
        tasks,
    )
    raw["grid"] |= {"budget.multiplier": [0.5, 1], "seed": [0, 1]}
    began = time.thread_time()
    plan = make_plan(study_from(raw).resolved(), facts())
    assert time.thread_time() - began < 2
    assert len(plan.trajectories) == 4 * 3 * techniques * budgets * seeds
    parallel, sequential = tasks, tasks - 1
    assert count(plan, "train") == budgets * seeds * (parallel + sequential + 2 * techniques * sequential)
    assert plan.naive["train"] == len(plan.trajectories) * tasks


def test_experts_of_init_base_serve_every_deployment_and_technique() -> None:
    entries = [{"init": "base", "deploy": ["all", "ema", "latest"], "technique": TECHNIQUES}]
    plan = plan_of(entries, 4)
    assert count(plan, "train") == 4
    assert all(
        set(step.inputs.values()) == {base_of(plan)} for step in plan.steps.values() if step.kind == "train"
    )


def test_one_chain_of_init_latest_serves_every_deployment_and_technique() -> None:
    plan = plan_of([{"init": "latest", "deploy": ["all", "ema", "latest"], "technique": TECHNIQUES}], 4)
    assert count(plan, "train") == 4
    first, second = [step for step in plan.steps.values() if step.kind == "train"][:2]
    assert second.inputs == {"init": first.fingerprint}


@pytest.mark.parametrize("init", ["all", "ema"])
def test_one_chain_per_technique_and_parameters_for_merged_initializations(init: str) -> None:
    params = [{"scale": 0.1}, {"scale": 0.2}]
    entries = [
        {"name": f"s{i}{deploy}", "init": init, "deploy": deploy, "technique": "ties", "params": one}
        for i, one in enumerate(params)
        for deploy in ("latest", "all", "ema")
    ]
    assert count(plan_of(entries, 4), "train") == 1 + 2 * 3


def test_parameters_of_a_form_that_is_not_used_do_not_part_chains() -> None:
    entries = [
        {
            "name": "a",
            "init": "ema",
            "deploy": "all",
            "technique": "average",
            "params": {"schedule": "linear"},
        },
        {"name": "b", "init": "ema", "deploy": "all", "technique": "average", "params": {"schedule": "sqrt"}},
    ]
    plan = plan_of(entries, 3)
    assert count(plan, "train") == 3
    assert count(plan, "merge") == 2 + 2 * 3


def test_default_written_out_is_the_same_merge() -> None:
    entries = [
        {"name": "a", "init": "base", "deploy": "ema", "technique": "average"},
        {"name": "b", "init": "base", "deploy": "ema", "technique": "average", "params": {"weight": 0.5}},
    ]
    assert count(plan_of(entries, 3), "merge") == 3


def test_first_tasks_are_shared_between_initializations_but_not_between_mixtures() -> None:
    plan = plan_of(
        ["continual_finetuning", "offline_merging", "continual_finetuning_replay", "best_in_time"], 3
    )
    first = {t.id: t.points[1].train for t in plan.trajectories}
    assert first["continual_finetuning"] == first["offline_merging"]
    assert first["continual_finetuning_replay"] == first["best_in_time"]
    assert first["offline_merging"] != first["best_in_time"]


def test_second_study_with_one_more_technique_reuses_every_expert_and_evaluation() -> None:
    one = plan_of([{"init": "base", "deploy": "all", "technique": ["average", "ties"]}], 4)
    two = plan_of([{"init": "base", "deploy": "all", "technique": ["magmax", "average", "ties"]}], 4)
    assert of_kind(two, "train") == of_kind(one, "train")
    assert set(one.steps) < set(two.steps)
    assert {two.steps[fp].kind for fp in set(two.steps) - set(one.steps)} == {"merge", "evaluate"}


def test_expert_without_replay_is_the_same_wherever_its_task_stands() -> None:
    forward = plan_of(["offline_merging"], 3)
    backward = plan_of(["offline_merging"], 3, stream={"tasks": ["d3", "d2", "d1"]})
    assert of_kind(forward, "train") == of_kind(backward, "train")


def test_replay_makes_an_expert_depend_on_the_tasks_before_it() -> None:
    forward = plan_of(["offline_merging_replay"], 3)
    backward = plan_of(["offline_merging_replay"], 3, stream={"tasks": ["d3", "d2", "d1"]})
    assert not of_kind(forward, "train") & of_kind(backward, "train")


# --- the graph -----------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.lists(strategy, min_size=1, max_size=6, unique=True), st.integers(1, 4))
def test_every_step_follows_what_it_needs_and_refers_to_steps_that_are_there(
    strategies: list[tuple[str, str, str, str]], tasks: int
) -> None:
    entries = [
        {"name": f"s{i}", "init": init, "deploy": deploy, "technique": technique, "ema_seed": seed}
        for i, (init, deploy, technique, seed) in enumerate(strategies)
    ]
    plan = plan_of(entries, tasks)
    done = {base_of(plan)}
    for fp, step in plan.steps.items():
        assert step.fingerprint == fp
        assert {*step.inputs.values(), *step.after} <= done
        done.add(fp)
    for trajectory in plan.trajectories:
        assert [point.t for point in trajectory.points] == list(range(tasks + 1))
        for point in trajectory.points:
            used = {point.train, point.init, point.deployed, point.merge, point.evaluate, point.own} - {
                None,
                "base",
            }
            assert used <= set(plan.steps)
            assert plan.steps[point.evaluate].spec["model"] in (point.deployed, base_of(plan))


def test_merges_of_a_series_wait_for_the_one_before() -> None:
    plan = plan_of([{"init": "base", "deploy": "all", "technique": "ties"}], 4)
    merges = [step for step in plan.steps.values() if step.kind == "merge"]
    assert [step.t for step in merges] == [1, 2, 3, 4]
    assert [step.after for step in merges] == [(), *((before.fingerprint,) for before in merges[:-1])]
    assert [len(step.spec["inputs"]) for step in merges] == [1, 2, 3, 4]
    assert list(merges[2].inputs) == ["base", "t1", "t2", "t3"]


def test_fold_takes_the_running_model_first_and_both_seeds_of_the_fold_differ_where_they_should() -> None:
    from_base = plan_of([{"init": "base", "deploy": "ema", "technique": "average"}], 3)
    folds = [step for step in from_base.steps.values() if step.kind == "merge"]
    assert [[name for name, _ in step.spec["inputs"]] for step in folds] == [
        ["running-0", "t1"],
        ["running-1", "t2"],
        ["running-2", "t3"],
    ]
    assert folds[0].spec["inputs"][0][1] == base_of(from_base)
    assert folds[1].spec["inputs"][0][1] == folds[0].fingerprint
    from_expert = plan_of(
        [{"init": "base", "deploy": "ema", "technique": "average", "ema_seed": "first_expert"}], 3
    )
    assert count(from_expert, "merge") == 2
    assert from_expert.trajectories[0].points[1].merge is None
    assert from_expert.trajectories[0].points[1].deployed == from_expert.trajectories[0].points[1].train


def test_zero_shot_trains_and_merges_nothing_and_is_scored_once() -> None:
    plan = plan_of(["zero_shot"], 3)
    assert [step.kind for step in plan.steps.values()] == ["evaluate"]
    assert plan.naive == {"train": 0, "merge": 0, "evaluate": 1}
    assert [point.deployed for point in plan.trajectories[0].points] == ["base"] * 4


def test_joint_training_has_one_expert_of_all_tasks_with_their_summed_length() -> None:
    plan = plan_of(["multitask"], 3)
    (train,) = [step for step in plan.steps.values() if step.kind == "train"]
    assert train.spec["steps"] == 300
    assert [source["dataset"] for source in train.spec["update"]] == ["d1", "d2", "d3"]
    assert train.spec["buffer"] == []
    assert [(point.t, point.train is None) for point in plan.trajectories[0].points] == [
        (0, True),
        (3, False),
    ]


def test_expert_that_is_never_served_is_scored_on_its_own_task_only() -> None:
    plan = plan_of(["offline_merging"], 3)
    for point in plan.trajectories[0].points[1:]:
        own = plan.steps[point.own or ""]
        assert own.spec["model"] == point.train
        assert [source["dataset"] for source in own.spec["datasets"]] == [point.task]
    served = plan_of(["offline_merging", "continual_finetuning"], 3)
    offline, continual = served.trajectories
    assert offline.points[1].own == continual.points[1].evaluate
    assert offline.points[2].own != continual.points[2].evaluate


def test_replay_reads_the_pool_and_all_earlier_tasks_in_order() -> None:
    plan = plan_of(["continual_finetuning_replay"], 3)
    third = plan.steps[plan.trajectories[0].points[3].train or ""]
    assert [source["dataset"] for source in third.spec["buffer"]] == ["d1", "d2"]
    assert [source["dataset"] for source in third.spec["pretraining"]] == ["pool"]
    plain = plan_of(["continual_finetuning"], 3)
    assert plain.steps[plain.trajectories[0].points[3].train or ""].spec["buffer"] == []


def test_slugs_are_path_segments_and_labels_are_for_people() -> None:
    plan = plan_of(["best_in_time", "multitask", "zero_shot"], 3)
    for step in plan.steps.values():
        assert "/" not in step.slug and not step.slug.startswith(".") and len(step.slug) <= 120
    slugs = {step.slug for step in plan.steps.values()}
    assert {"t3-d3-init_ema-average", "t2-merge_ema-average-init_ema", "scores-base"} <= slugs


# --- summary, JSON, budget -----------------------------------------------------------------------------------------------


class Holding(set[str]):
    def has(self, kind: str, fingerprint: str) -> bool:
        return fingerprint in self


def test_summary_counts_unique_naive_and_cached_steps_and_what_is_ahead() -> None:
    plan = plan_of(["offline_merging", "best_in_time"], 3)
    whole = plan.summary()
    assert whole["study"] == "toy" and whole["trajectories"] == 2
    assert whole["steps"]["train"] == {"unique": 6, "naive": 6, "cached": 0}
    assert whole["gflops"] == pytest.approx(6 * 100 * 64 * 0.5)
    assert whole["gflops_naive"] == whole["gflops"]
    assert whole["critical_path"] == {"steps": 7, "train": 3, "merge": 3, "evaluate": 1}
    assert whole["missing"] == []
    trains = of_kind(plan, "train")
    rest = plan.summary(Holding(trains))
    assert rest["steps"]["train"]["cached"] == 6
    assert rest["gflops"] == 0
    assert 0 < rest["disk_bytes"] < whole["disk_bytes"]
    assert plan.summary(Holding(plan.steps))["disk_bytes"] == 0


def test_summary_does_not_invent_the_cost_of_an_unmeasured_model() -> None:
    plan = make_plan(study(["offline_merging"]), facts(gflops_per_sample={}))
    assert plan.summary()["gflops"] is None


def test_plan_survives_json() -> None:
    plan = plan_of(["best_in_time", "multitask", "zero_shot"], 3)
    again = decode(json.loads(json.dumps(encode(plan))))
    assert again == plan
    assert again.fingerprint == plan.fingerprint
    assert list(again.steps) == list(plan.steps)


@pytest.mark.parametrize("body", [{}, {"format": 0}, {"format": 1, "steps": 3}, {"format": 1, "steps": [{}]}])
def test_text_that_is_no_plan_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(PlanError):
        decode(body)


def test_plan_identity_tells_studies_apart_that_share_all_steps() -> None:
    assert plan_of(["best_in_time"], name="a").fingerprint != plan_of(["best_in_time"], name="b").fingerprint


PUBLISHED = {  # FoMo-in-Flux, ViT-B/16, batch 512: (GFLOPs per step, memory multiplier, steps by number of tasks)
    "full fine-tuning": (63394.7585, 1.0, {20: 1420, 50: 568, 100: 284, 200: 142}),
    "locked text": (57254.6183, 0.8064, {20: 1949, 50: 780, 100: 390, 200: 195}),
    "locked image": (27176.6698, 0.2551, {20: 12982, 50: 5193, 100: 2596, 200: 1298}),
}


@pytest.mark.parametrize("method", PUBLISHED)
@pytest.mark.parametrize("tasks", [20, 50, 100, 200])
def test_total_of_gflops_gives_the_published_steps(method: str, tasks: int) -> None:
    gflops, ratio, steps = PUBLISHED[method]
    assert steps_per_task(BudgetSection(total_gflops=1.8e9), tasks, 512, gflops / 512, ratio) == steps[tasks]


def test_multiplier_scales_the_steps() -> None:
    budgets = [BudgetSection(total_gflops=1.8e9, multiplier=m) for m in (0.5, 1, 2, 4)]
    assert [steps_per_task(b, 20, 512, 63394.7585 / 512, 1.0) for b in budgets] == [710, 1420, 2839, 5679]


def test_budget_of_less_than_a_step_is_refused() -> None:
    with pytest.raises(PlanError, match="at least one"):
        plan_of(["best_in_time"], budget={"samples_per_task": 10})


def test_total_of_gflops_needs_a_measured_model() -> None:
    one = study(["best_in_time"], budget={"total_gflops": 1e9})
    with pytest.raises(PlanError, match="not measured"):
        make_plan(one, facts(gflops_per_sample={}))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"d2": None}, "d2 is not among"),
        ({"d2": DatasetFacts({"test": "x"})}, "d2 has no train split"),
        ({"d2": DatasetFacts({"train": "x"})}, "d2 has no test split"),
        ({"kept": DatasetFacts({"train": "x"})}, "kept has no test split"),
        ({"pool": DatasetFacts({"test": "x"})}, "pool has no train split"),
    ],
)
def test_missing_data_stop_the_plan_by_name(changed: dict[str, Any], words: str) -> None:
    datasets = {name: value for name, value in {**facts().datasets, **changed}.items() if value is not None}
    with pytest.raises(PlanError, match=words):
        make_plan(study(["best_in_time"]), replace(facts(), datasets=datasets))


def test_pool_is_not_needed_where_nothing_is_taken_from_it() -> None:
    datasets = {name: value for name, value in facts().datasets.items() if name != "pool"}
    one = study(["continual_finetuning"], recipe={"precision": "fp32"})
    assert count(make_plan(one, replace(facts(), datasets=datasets)), "train") == 3


def test_base_is_named_by_its_bytes() -> None:
    assert base_step("a").fingerprint != base_step("b").fingerprint
    assert base_step("a", model="one").fingerprint == base_step("a", model="two").fingerprint
