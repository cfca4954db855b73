"""Measure steps in a plan: their identity, the rights to data, and what is refused."""

from dataclasses import replace

import pytest

from merge_service.techniques import get, names
from merge_service.timelines import Strategy, check, measured
from pipeline.errors import ConfigError, PlanError
from pipeline.kinds.specs import MeasureSpec, MergeSpec
from pipeline.plan.steps import Plan
from tests.pipeline.plan_toys import facts, make_plan, study

NO_REPLAY = {"pretraining": 0.0, "update": 1.0, "buffer": 0.0}
SEEING = [one for one in names() if (get(one).evidence and not get(one).learned) or get(one).resumes]
REGMEAN = {"init": "base", "deploy": "all", "technique": "regmean"}


def measures(plan: Plan) -> list[MeasureSpec]:
    return [MeasureSpec.of(step.spec) for step in plan.steps.values() if step.kind == "measure"]


@pytest.mark.parametrize("change", [{"examples": 9}, {"seed": 1}, {"precision": "bf16"}])
def test_rows_and_parameters_are_part_of_the_fingerprint_and_of_no_expert(change) -> None:
    plans = [make_plan(study([REGMEAN], statistics=how), facts()) for how in ({}, change)]
    steps = [{fp for fp, step in plan.steps.items() if step.kind == "measure"} for plan in plans]
    experts = [{fp for fp, step in plan.steps.items() if step.kind == "train"} for plan in plans]
    assert len(steps[0]) == len(steps[1]) == 3 and not steps[0] & steps[1] and experts[0] == experts[1]


def test_parameters_of_gradients_are_none_of_a_gram_matrix() -> None:
    plans = [
        make_plan(study([REGMEAN], statistics=how), facts())
        for how in ({}, {"labels": "expectation", "towers": "image"})
    ]
    assert [one.to_json() for one in measures(plans[0])] == [one.to_json() for one in measures(plans[1])]
    fisher = {**REGMEAN, "technique": "fisher"}
    (first, *_) = measures(make_plan(study([fisher], statistics={"towers": "image"}), facts()))
    assert first.params["towers"] == "image" and first.inputs()["head"] == first.head != ""


def test_study_without_measurements_is_planned_and_written_as_before() -> None:
    plain = study(["best_in_time"])
    assert "measure" not in make_plan(plain, facts()).summary()["steps"]
    assert "statistics: {}" in plain.resolved_yaml() and "measure" not in plain.resolved_yaml()


def test_axis_of_statistics_multiplies_only_what_is_measured() -> None:
    one = study([REGMEAN, "best_in_time"])
    two = study(
        [REGMEAN, "best_in_time"],
        grid={"strategies": [REGMEAN, "best_in_time"], "statistics.examples": [8, 64]},
    )
    assert [len(found.cells) for found in (one, two)] == [2, 3]
    plan = make_plan(two, facts())
    assert {spec.examples for spec in measures(plan)} == {8, 64}
    assert (
        len([1 for step in plan.steps.values() if step.kind == "train"]) == 3 + 2
    )  # the first expert is one


def test_merge_names_the_measurement_of_every_expert_and_reads_it_back() -> None:
    plan = make_plan(study([REGMEAN]), facts())
    merge = [step for step in plan.steps.values() if step.kind == "merge"][-1]
    spec = MergeSpec.of(merge.spec)
    assert [name for name, _ in spec.statistics] == ["t1", "t2", "t3"]
    assert spec.to_json() == merge.spec and set(dict(spec.statistics).values()) <= {*merge.inputs.values()}
    for name, step in spec.statistics:
        assert measures(plan)[0].inputs().keys() == {"model 1"}
        assert plan.steps[step].inputs == {"model 1": dict(spec.members)[name]}


def test_cost_is_charged_once_in_the_plan_and_to_every_trajectory_one_by_one() -> None:
    plain, seen = (
        make_plan(study([{**REGMEAN, "technique": one}]), facts()) for one in ("average", ["regmean", "lot"])
    )
    experts, measuring = 3 * 0.5 * 64 * 100, 3 * 0.86 * 0.5 * 256
    assert plain.summary()["gflops"] == pytest.approx(experts)
    assert seen.summary()["gflops"] == pytest.approx(experts + measuring)
    assert seen.naive_gflops == pytest.approx(2 * (experts + measuring))
    assert seen.naive["measure"] == 6 and seen.summary()["steps"]["measure"]["unique"] == 3


def test_measuring_all_experts_on_old_data_takes_a_buffer() -> None:
    together = {**REGMEAN, "technique": "regmean_plus"}
    with pytest.raises(ConfigError, match="allows no old data"):
        study([{**together, "mixture": NO_REPLAY}])
    plan = make_plan(study([together]), facts())
    assert (
        [len(spec.models) for spec in measures(plan)]
        == [1, 2, 3]
        == [len(spec.data) for spec in measures(plan)]
    )
    assert study([{**REGMEAN, "mixture": NO_REPLAY}]).cells  # data of the new task alone are always allowed


def test_gradients_of_captions_are_refused_before_anything_runs() -> None:
    known = facts()
    datasets = {**known.datasets, "d2": replace(known.datasets["d2"], kind="retrieval")}
    asked = replace(known, datasets=datasets)
    with pytest.raises(PlanError, match="task d2: fisher takes gradients of class scores"):
        make_plan(study([{**REGMEAN, "technique": "fisher"}]), asked)
    assert measures(make_plan(study([REGMEAN]), asked))


@pytest.mark.parametrize("technique", SEEING)
@pytest.mark.parametrize("init", ["base", "latest", "all", "ema"])
@pytest.mark.parametrize("deploy", ["all", "ema"])
def test_technique_is_planned_in_every_form_that_it_has_and_refused_in_others(
    technique, init, deploy
) -> None:
    strategy = {"init": init, "deploy": deploy, "technique": technique}
    if technique == "mats":
        strategy["params"] = {"metric": "kfac"}
    if "ema" in (init, deploy) and "fold" not in get(technique).forms:
        with pytest.raises(ConfigError, match="has no fold form"):
            study([strategy])
        return
    plan = make_plan(study([strategy]), facts())
    assert bool(measures(plan)) == bool(get(technique).evidence)
    for step in (step for step in plan.steps.values() if step.kind == "merge"):
        spec = MergeSpec.of(step.spec)
        assert [name for name, _ in spec.members] == [f"t{t}" for t in range(1, step.t + 1)]
        assert len(spec.statistics) == (len(spec.members) if get(technique).evidence else 0)


def test_fold_of_sums_cannot_begin_at_the_base() -> None:
    strategy = {"init": "ema", "deploy": "ema", "technique": "regmean"}
    with pytest.raises(ConfigError, match="set ema_seed: first_expert"):
        study([{**strategy, "ema_seed": "base"}])
    assert study([strategy]).cells[0].strategy.ema_seed == "first_expert"


def test_strategy_says_what_it_measures() -> None:
    strategy = Strategy("base", "all", "mats", {"metric": "fisher"})
    check(strategy)
    assert [one.kind for one in measured(strategy)] == ["fisher"]
    assert measured(Strategy("base", "all", "mats", {"metric": "identity"})) == ()
    assert measured(Strategy("base", "all", "average")) == measured(Strategy("latest", "latest")) == ()
