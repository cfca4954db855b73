"""Which merges a study keeps, and the disk that its choice takes."""

from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.plan.keeping import AT_ONCE, disk, kept_merges, only_scored, resume_bytes, waiting_for
from pipeline.plan.steps import Plan
from tests.pipeline.plan_toys import facts, make_plan, study

OFFLINE = {"init": "base", "deploy": "all", "technique": "average"}
FOLD = {"init": "base", "deploy": "ema", "technique": "average"}
BEST = "best_in_time"
TASKS = 6


def plan_of(*strategies: Any) -> Plan:
    return make_plan(study([*strategies], TASKS), facts())


def how(keep: str, anchors: int = 0) -> Any:
    return SimpleNamespace(keep=keep, anchors=anchors)


def times(plan: Plan, kept: frozenset[str]) -> list[int]:
    return sorted(plan.steps[fp].t for fp in kept)


def test_all_final_and_none() -> None:
    plan = plan_of(OFFLINE, FOLD)
    assert times(plan, kept_merges(plan, how("all"))) == sorted([*range(1, 7), *range(1, 7)])
    assert (
        times(plan, kept_merges(plan, how("final"))) == [6, 6] == times(plan, kept_merges(plan, how("best")))
    )
    assert times(plan, kept_merges(plan, how("none"))) == []


def test_anchors_are_folds_only_and_not_kept_with_none() -> None:
    plan = plan_of(OFFLINE, FOLD)
    assert times(plan, kept_merges(plan, how("final", 2))) == [2, 4, 6, 6]
    assert times(plan, kept_merges(plan, how("none", 2))) == []


def test_what_cannot_be_made_again_anywhere_stays() -> None:
    plan = plan_of({**OFFLINE, "technique": "iso_c"})
    assert times(plan, kept_merges(plan, how("none"))) == [*range(1, 7)]


def test_merges_that_others_start_from_are_not_only_scored() -> None:
    plan = plan_of(OFFLINE, FOLD, BEST)
    scored = only_scored(plan, waiting_for(plan))
    forms = {plan.steps[fp].spec["form"] for fp in scored}
    assert forms == {"merge", "fold"}  # every merge of all at once, and the last fold of each chain
    assert [plan.steps[fp].t for fp in scored if plan.steps[fp].spec["form"] == "fold"] == [6, 6]


@pytest.mark.parametrize("keep", ["all", "final", "none"])
def test_peak_lies_between_what_stays_and_what_all_take(keep: str) -> None:
    plan = plan_of(OFFLINE, FOLD, BEST)
    found = disk(plan, plan.steps, kept_merges(plan, how(keep)))
    merges = [step.disk_bytes for step in plan.steps.values() if step.kind == "merge"]
    one = merges[0]
    assert found.all == sum(step.disk_bytes for step in plan.steps.values())
    assert found.kept <= found.least <= found.peak <= found.all + 2 * one
    stays = {"all": found.all, "final": found.all - sum(merges) + 3 * one, "none": found.all - sum(merges)}
    assert found.kept == stays[keep]
    if keep == "all":
        assert found.least == found.peak == found.all
    if keep == "none":
        chains = 2 * 2 * one  # two merges of each of two chains
        copies = 2 * one  # made where a fold is proven
        assert found.least == found.kept + chains + one + copies
        assert found.peak == found.kept + chains + AT_ONCE * one + copies


def test_study_of_merges_of_all_at_once_needs_room_for_two_of_them() -> None:
    plan = plan_of(OFFLINE)
    found = disk(plan, plan.steps, kept_merges(plan, how("none")))
    one = found.scored
    assert one and found.least == found.kept + 2 * one
    assert found.merges_at_once(found.least - 1) == 1 == found.merges_at_once(found.least)
    assert found.merges_at_once(found.least + one) == 2
    assert found.merges_at_once(found.least + 100 * one) == AT_ONCE == found.merges_at_once(None)


def test_what_is_done_takes_nothing_more() -> None:
    plan = plan_of(OFFLINE)
    assert disk(plan, [], kept_merges(plan, how("none"))).peak == 0


@pytest.mark.parametrize(
    ("pace", "copies"),
    [((0, 0.0), 0), ((50, 0.0), 0), ((25, 0.0), 3), ((10, 0.0), 6), ((0, 300.0), 6)],
    ids=["never", "none before the last step", "one", "one and the next", "by time"],
)
def test_checkpoints_of_an_expert_in_training_are_counted(pace: tuple[int, float], copies: int) -> None:
    plan = make_plan(study([FOLD], TASKS, budget={"steps_per_task": 50}), facts())
    (size,) = {step.disk_bytes for step in plan.steps.values() if step.kind == "train"}
    assert size > 0 and resume_bytes(plan, plan.steps.keys(), lambda _: pace) == copies * size
    assert (
        resume_bytes(plan, [fp for fp in plan.steps if plan.steps[fp].kind != "train"], lambda _: pace) == 0
    )


def test_average_over_steps_is_one_copy_more() -> None:
    recipe = {"ema": 0.9}
    plan = make_plan(study([FOLD], TASKS, budget={"steps_per_task": 50}, recipe=recipe), facts())
    (size,) = {step.disk_bytes for step in plan.steps.values() if step.kind == "train"}
    assert resume_bytes(plan, plan.steps.keys(), lambda _: (0, 300.0)) == 8 * size


ADAPTER = {"adapter": {"rank": 8}}


def adapted(strategies: list, **changes) -> tuple[Plan, int, int]:
    """The plan of a study of adapter experts, the size of an adapter and that of whole weights."""
    made = study(strategies, TASKS, recipe=ADAPTER, **changes)
    (trains,) = {cell.recipe.trains for cell in made.cells}
    plan = make_plan(made, facts(adapter_bytes={trains: 20_000}))
    (size,) = {step.disk_bytes for step in plan.steps.values() if step.kind == "train"}
    (whole,) = {base.disk_bytes for base in plan.bases.values()}
    return plan, size, whole


def test_adapters_count_what_is_kept_and_whole_weights_only_while_they_are_read() -> None:
    plan, size, whole = adapted([OFFLINE])
    assert 20_000 < size < 20_000 + whole / 10
    merges = kept_merges(plan, how("none"))
    found = disk(plan, plan.steps, merges)
    trained = sum(step.kind == "train" for step in plan.steps.values())
    assert found.kept == trained * size + sum(
        step.disk_bytes for step in plan.steps.values() if step.kind not in ("train", "merge")
    )
    bare = disk(plan, [fp for fp, step in plan.steps.items() if step.kind != "train"], merges)
    assert found.least - found.kept == bare.least - bare.kept  # a merge of all reads every expert
    assert found.least > found.kept + trained * whole
    assert disk(plan, plan.steps, merges, cache=10**12).peak == found.peak  # no more experts than that
    (last,) = {fp for fp, step in plan.steps.items() if step.kind == "merge" and step.t == TASKS}
    assert len(plan.steps[last].inputs) >= trained


def test_store_at_a_url_keeps_whole_weights_beside_adapters() -> None:
    _, size, whole = adapted([OFFLINE], storage={"store": "s3://bucket/x"})
    assert size > whole + 20_000 - 1_000
