"""Identity of steps: everything that affects a result changes it, and nothing else does."""

import json
from dataclasses import replace
from typing import Any

import pytest

from pipeline.identity import fingerprint
from pipeline.kinds.table import KINDS
from pipeline.plan.facts import base_of, has_resblocks
from pipeline.plan.file import encode
from pipeline.plan.steps import DatasetFacts, Plan
from pipeline.study.config import study_from
from pipeline.study.sections import ModelSection
from tests.pipeline.plan_toys import REPLAY, facts, make_plan, raw_study, study
from workers.training.recipe import Recipe


def plan_of(strategies: list[Any], tasks: int = 3, **changes: Any) -> Plan:
    return make_plan(study(strategies, tasks, **changes), facts())


def of_kind(plan: Plan, kind: str) -> set[str]:
    return {fp for fp, step in plan.steps.items() if step.kind == kind}


IRRELEVANT = [
    {"name": "other"},
    {"data": {"root": "/elsewhere", "cache": "/tmp/c", "pretraining": ["pool"], "held_out": ["kept"]}},
    {"resources": {"experts": {"cpus": 4, "groups": 3, "max_retries": 9, "checkpoint_every": 1}}},
    {"resources": {"evaluation": {"cpus": 2, "actors": 7, "threads": 2}, "merging": {"threads": 8}}},
    {"resources": {"experts": {"activation_checkpointing": True, "loaders": 8}}},
    {
        "recipe": {
            "batch_size": 64,
            "precision": "fp32",
            "mixture": REPLAY,
            "accumulate": 1,
            "compile": False,
            "ema": None,
        }
    },
    {"tracking": {"uri": "http://127.0.0.1:5000", "experiment": "x"}},
    {"evaluation": {"batch_size": 7, "seed": 5}},
    {"budget": {"samples_per_task": 6400}},
    {"budget": {"steps_per_task": 50, "multiplier": 2}},
    {"budget": {"total_gflops": 100 * 64 * 0.5 * 3}},
]


@pytest.mark.parametrize("change", IRRELEVANT, ids=lambda change: json.dumps(change)[:50])
def test_step_does_not_depend_on_place_pace_or_names(change: dict[str, Any]) -> None:
    assert set(plan_of(["best_in_time"], **change).steps) == set(plan_of(["best_in_time"]).steps)


def with_recipe(**changes: Any) -> dict[str, Any]:
    return {"recipe": {"batch_size": 64, "precision": "fp32", "mixture": REPLAY, **changes}}


RELEVANT_FOR_EXPERTS = [
    with_recipe(lr=2e-5),
    with_recipe(weight_decay=0.1),
    with_recipe(batch_size=32),
    with_recipe(precision="bf16"),
    with_recipe(trainable="image"),
    with_recipe(augment={"scale": [0.5, 1.0]}),
    with_recipe(mixture={"update": 0.9, "pretraining": 0.1}),
    with_recipe(accumulate=2),
    with_recipe(ema=0.999),
    with_recipe(patch_dropout=0.5),
    with_recipe(patch_dropout=0),
    with_recipe(compile=True),
    with_recipe(channels_last=True),
    {"budget": {"steps_per_task": 101}},
    {"resources": {"experts": {"threads": 2}}},
    {"resources": {"experts": {"workers": 2}}},
    {"resources": {"experts": {"workers": 2, "zero_stage": 1}}},
    {"resources": {"experts": {"engine": "deepspeed"}}},
    {"resources": {"experts": {"gpus": 1}}},
    {"grid": {"strategies": ["best_in_time"], "seed": [1]}},
]


@pytest.mark.parametrize("change", RELEVANT_FOR_EXPERTS, ids=lambda change: json.dumps(change)[-50:])
def test_expert_depends_on_recipe_length_seed_and_numerics(change: dict[str, Any]) -> None:
    assert not of_kind(plan_of(["best_in_time"], **change), "train") & of_kind(
        plan_of(["best_in_time"]), "train"
    )


def test_steps_depend_on_the_content_of_base_and_data() -> None:
    one = study(["best_in_time"])
    before = make_plan(one, facts())
    for changed in (facts(weights="c" * 64), facts(config="c" * 64)):
        assert not set(make_plan(one, changed).steps) & set(before.steps)
    datasets = dict(facts().datasets)
    datasets["kept"] = DatasetFacts({"train": "kept/train", "test": "changed"}, "kept/prompts")
    after = make_plan(one, replace(facts(), datasets=datasets))
    assert of_kind(after, "train") == of_kind(before, "train")
    assert of_kind(after, "merge") == of_kind(before, "merge")
    assert {
        after.steps[fp].slug
        for fp in set(after.steps) & set(before.steps)
        if after.steps[fp].kind == "evaluate"
    } == {step.slug for step in after.steps.values() if step.slug.startswith("own")}
    datasets["d2"] = DatasetFacts({"train": "d2/train", "test": "d2/test"}, "other prompts")
    later = make_plan(one, replace(facts(), datasets=datasets))
    unchanged = of_kind(later, "train") & of_kind(before, "train")
    assert [later.steps[fp].t for fp in unchanged] == [1]


@pytest.mark.parametrize("kind", ["train", "merge", "evaluate"])
def test_new_version_of_the_code_of_a_kind_makes_its_steps_anew(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = plan_of(["best_in_time"])
    monkeypatch.setitem(KINDS, kind, replace(KINDS[kind], revision=99))
    assert not of_kind(plan_of(["best_in_time"]), kind) & of_kind(before, kind)


def test_same_study_gives_the_same_plan() -> None:
    assert encode(plan_of(["best_in_time", "multitask"])) == encode(plan_of(["best_in_time", "multitask"]))


def test_random_masks_follow_the_seed_of_the_trajectory_unless_fixed() -> None:
    raw = raw_study([{"init": "base", "deploy": "all", "technique": "dare_ties"}])
    raw["grid"]["seed"] = [3, 4]
    plan = make_plan(study_from(raw).resolved(), facts())
    assert {step.spec["params"]["seed"] for step in plan.steps.values() if step.kind == "merge"} == {3, 4}
    raw["grid"]["strategies"][0]["params"] = {"seed": 7}
    plan = make_plan(study_from(raw).resolved(), facts())
    assert {step.spec["params"]["seed"] for step in plan.steps.values() if step.kind == "merge"} == {7}


def test_no_two_tasks_draw_with_the_same_seed() -> None:
    raw = raw_study(["offline_merging"], 6)
    raw["grid"]["seed"] = [0, 1, 2]
    plan = make_plan(study_from(raw).resolved(), facts())
    seeds = [step.spec["seed"] for step in plan.steps.values() if step.kind == "train"]
    assert len(set(seeds)) == 18
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_parity_is_the_strategy_written_out_and_null_is_none() -> None:
    """The switch has no identity of its own: its steps are those of the same parameters set by hand."""
    theirs = {"init": "latest", "deploy": "ema", "technique": "ties", "parity": "fomo_in_flux"}
    by_hand = {
        "init": "latest", "deploy": "ema", "technique": "ties", "ema_seed": "first_expert",
        "params": {"density": 0.3, "logit_scale": "unclamped"},
    }  # fmt: skip
    assert set(plan_of([theirs]).steps) == set(plan_of([by_hand]).steps)
    assert (
        plan_of([{"preset": "best_in_time", "parity": None}]).fingerprint
        == plan_of(["best_in_time"]).fingerprint
    )
    (trajectory,) = plan_of([theirs]).trajectories
    assert (trajectory.params["density"], trajectory.ema_seed) == (0.3, "first_expert")


def test_offline_merging_on_a_par_serves_the_first_expert_itself() -> None:
    plan = plan_of([{"preset": "offline_merging", "technique": "ties", "parity": "fomo_in_flux"}])
    (trajectory,) = plan.trajectories
    kinds = [plan.steps[point.deployed].kind for point in trajectory.points[1:]]
    assert kinds == ["train", "merge", "merge"]


def test_merges_of_a_base_that_is_not_made_of_resblocks_are_a_version_ahead() -> None:
    ours, theirs = (
        make_plan(study(["offline_merging"]), facts(resblocks=resblocks)) for resblocks in (True, False)
    )
    versions = [
        {
            kind: {s.spec["version"] for s in plan.steps.values() if s.kind == kind}
            for kind in ("train", "merge")
        }
        for plan in (ours, theirs)
    ]
    assert versions == [{"train": {1}, "merge": {1}}, {"train": {1}, "merge": {2}}]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("ViT-B-32", True), ("ViT-L-14-quickgelu", True), ("tiny-clip", True), ("RN50", False), ("convnext_base", False),
        ("ViT-B-16-SigLIP", False), ("coca_ViT-B-32", False), ("roberta-ViT-B-32", False),
    ],
)  # fmt: skip
def test_configuration_says_whether_a_base_is_made_of_resblocks(config: str, expected: bool) -> None:
    assert has_resblocks(base_of(ModelSection(config=config))) == expected


def test_base_of_which_nothing_is_known_is_not_taken_to_be_made_of_resblocks() -> None:
    assert not has_resblocks(None)


def test_details_of_evaluations_are_part_of_their_identity_in_any_order_and_none_are_as_before() -> None:
    def scored(**evaluation: Any) -> set[str]:
        plan = make_plan(study(["zero_shot"], evaluation=evaluation), facts())
        return {name for name, step in plan.steps.items() if step.kind == "evaluate"}

    assert scored() == scored(details=[])
    assert scored(details=["top5", "confusion"]) == scored(details=["confusion", "top5"])
    assert not scored() & scored(details=["top5"])


def test_tf32_is_part_of_the_identity_of_experts_of_a_gpu() -> None:
    resources = {"experts": {"gpus": 1}}
    one, other = (
        plan_of(["best_in_time"], resources=resources, **change) for change in ({}, with_recipe(tf32=True))
    )
    assert not of_kind(one, "train") & of_kind(other, "train")


def test_recipe_that_uses_no_later_key_keeps_the_name_it_had() -> None:
    """The digest is that of the first version of recipes."""
    assert (
        fingerprint(Recipe().model_dump(mode="json"))
        == "3a783b129139b6ca9ec53030632914877efbc3b961c891750d57478f2d2a2464"
    )


def test_precision_of_scores_is_part_of_their_identity_where_it_is_not_single() -> None:
    def scored(gpus: int = 0, **evaluation: Any) -> set[str]:
        resources = {"experts": {"gpus": gpus}}
        plan = make_plan(study(["zero_shot"], evaluation=evaluation, resources=resources), facts())
        return {name for name, step in plan.steps.items() if step.kind == "evaluate"}

    assert scored() == scored(precision="fp32") == scored(precision="auto")
    assert not scored() & scored(precision="bf16")
    assert scored(1, precision="auto") == scored(1, precision="fp16") != scored(1)
