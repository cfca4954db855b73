"""Configuration: what is valid, and the message for each mistake."""

import json
from pathlib import Path
from typing import Any

import pytest

from merge_service.errors import UserError
from merge_service.timelines import PRESETS
from pipeline.errors import ConfigError
from pipeline.plan.facts import ensure_data
from pipeline.study import yaml_input
from pipeline.study.config import load_study, study_from
from tests.pipeline.plan_toys import REPLAY, raw_study

ROOT = Path(__file__).parents[3]


def problems(raw: dict[str, Any], *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        study_from(raw, "f.yaml", overrides)
    return caught.value.problems


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


# --- good studies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["demo", "smoke"])
def test_shipped_study_loads_without_warnings(name: str) -> None:
    study = load_study(ROOT / "configs" / f"{name}.yaml")
    assert study.name == name
    assert study.warnings == ()
    assert study.engine.kind == "torch"


def test_demo_has_the_trajectories_it_promises() -> None:
    demo = load_study(ROOT / "configs/demo.yaml")
    assert [cell.id for cell in demo.cells] == [
        "zero_shot",
        "offline_merging",
        "offline_merging_replay",
        "offline_merging-ties",
        "continual_finetuning",
        "continual_finetuning_replay",
        "best_in_time",
    ]
    assert len(demo.stream.tasks or ()) == 6
    several = load_study(ROOT / "configs/demo.yaml", ["grid.seed=[0,1,2]"])
    assert len(several.cells) == 21
    assert several.cells[2].id == "zero_shot-seed2"


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_stands_for_its_strategy(preset: str) -> None:
    (cell,) = study_from(raw_study([preset])).cells
    assert cell.id == cell.name == cell.group == preset
    assert cell.strategy == PRESETS[preset]


def test_study_survives_being_written_out(tmp_path: Path) -> None:
    raw = raw_study(
        ["zero_shot", {"preset": "offline_merging", "technique": "ties", "params": {"density": 0.5}}],
        budget={"total_gflops": 1.8e9},
    )
    raw["grid"] |= {"seed": [0, 1], "recipe": {"lr": [1e-5, 3e-4]}, "budget.multiplier": [0.5, 1]}
    study = study_from(raw)
    again = load_study(write(tmp_path / "study.yaml", study.resolved_yaml()))
    assert again == study
    assert again.cells == study.cells
    assert again.resolved_yaml() == study.resolved_yaml()


def test_numbers_mean_what_yaml_1_2_says() -> None:
    text = "a: [1e-5, 1E3, .5, 1.0, 0x10, 0o17, -3, +4, 1_000, on, no, 2020-01-01, 1:30, ~, True]"
    values = yaml_input.parse(text, "f")["a"]
    assert values == [
        1e-5,
        1000,
        0.5,
        1,
        16,
        15,
        -3,
        4,
        "1_000",
        "on",
        "no",
        "2020-01-01",
        "1:30",
        None,
        True,
    ]
    assert [type(value) for value in values[:4]] == [float, int, float, int]


def test_axes_multiply_out_in_the_order_written_and_are_named() -> None:
    raw = raw_study(["continual_finetuning", "best_in_time"])
    raw["grid"] |= {"budget": {"multiplier": [0.5, 1]}, "recipe.lr": [1e-5, 1e-4], "seed": [0, 7]}
    cells = study_from(raw).cells
    assert len(cells) == 2 * 2 * 2 * 2
    assert cells[0].id == "continual_finetuning-lr1e-05-x0.5-seed0"
    assert (cells[-1].id, cells[-1].group, cells[-1].name) == (
        "best_in_time-lr0.0001-x1-seed7",
        "best_in_time-lr0.0001-x1",
        "best_in_time-lr0.0001",
    )
    assert (cells[-1].recipe.lr, cells[-1].budget.multiplier, cells[-1].seed) == (1e-4, 1.0, 7)
    assert len({cell.id for cell in cells}) == len(cells)
    assert len({cell.group for cell in cells}) == len(cells) / 2


@pytest.mark.parametrize(
    ("strategy", "axes", "names"),
    [
        ("zero_shot", {"recipe.lr": [1e-5, 1e-4], "budget.multiplier": [1, 2]}, ["zero_shot"]),
        ("zero_shot", {"recipe.trainable": ["all", "image"], "model.seed": [0, 1]}, ["zero_shot-seed0", "zero_shot-seed1"]),
        ("offline_merging", {"recipe.mixture": [REPLAY, {"update": 1}]}, ["offline_merging"]),
        ("offline_merging", {"recipe.mixture": [REPLAY, {"update": 1}], "recipe.lr": [1e-5, 1e-4]}, ["offline_merging-lr1e-05", "offline_merging-lr0.0001"]),
        ("zero_shot", {"seed": [0, 1], "recipe.lr": [1e-5, 1e-4]}, ["zero_shot-seed0", "zero_shot-seed1"]),
        ("zero_shot", {"recipe.lr": [1e-5]}, ["zero_shot"]),
        ("best_in_time", {"model.pretrained": ["a/b"], "model.seed": [0, 1]}, ["best_in_time"]),
    ],
)  # fmt: skip
def test_axis_without_effect_on_a_strategy_counts_once(
    strategy: str, axes: dict[str, Any], names: list[str]
) -> None:
    raw = raw_study([strategy], recipe={"batch_size": 64, "precision": "fp32", "mixture": {}})
    raw["grid"] |= axes
    cells = study_from(raw).cells
    assert [cell.id for cell in cells] == names
    merged = {key for key, values in axes.items() if len(values) > 1 and len(cells) == 1}
    assert not any(merged & set(cell.axes) for cell in cells)


@pytest.mark.parametrize(
    ("override", "axis"),
    [
        ("recipe.lr=[1e-4,3e-4]", "grid.recipe.lr"),
        ("recipe.betas=[[0.9,0.98],[0.9,0.999]]", "grid.recipe.betas"),
        ("recipe.mixture=[{update: 1},{update: 0.5, buffer: 0.5}]", "grid.recipe.mixture"),
        ("budget.steps_per_task=[10,20]", "grid.budget.steps_per_task"),
        ("model=[{config: a},{config: b}]", "grid.model"),
        ("model.pretrained=[a,b]", "grid.model.pretrained"),
        ("stream=[{order: random, chunks: 3}]", "grid.stream"),
        ("seed=[0,1]", "grid.seed"),
    ],
)
def test_list_where_one_value_belongs_points_to_the_axis(override: str, axis: str) -> None:
    with pytest.raises(ConfigError) as caught:
        study_from(raw_study(["best_in_time"]), "f", [override])
    assert f"write {axis}" in str(caught.value) and "--set" in str(caught.value)


def test_list_of_bad_values_is_answered_as_a_bad_value() -> None:
    with pytest.raises(ConfigError) as caught:
        study_from(raw_study(["best_in_time"]), "f", ["recipe.lr=[fast,slow]"])
    assert "grid.recipe.lr" not in str(caught.value)


def test_dotted_and_nested_axes_are_the_same() -> None:
    dotted, nested = raw_study(["best_in_time"]), raw_study(["best_in_time"])
    dotted["grid"]["recipe.mixture"] = [REPLAY, {"update": 1}]
    nested["grid"]["recipe"] = {"mixture": [REPLAY, {"update": 1}]}
    assert study_from(dotted) == study_from(nested)
    assert [cell.recipe.mixture.buffer for cell in study_from(dotted).cells] == [0.33, 0.0]
    assert [cell.id for cell in study_from(dotted).cells] == [
        "best_in_time-mixture0.33_0.34_0.33",
        "best_in_time-mixture1",
    ]


def test_budget_may_stand_on_the_grid_alone() -> None:
    raw = raw_study(["best_in_time"])
    del raw["budget"]
    raw["grid"]["budget.steps_per_task"] = [10, 20]
    assert [cell.budget.steps_per_task for cell in study_from(raw).cells] == [10, 20]
    raw = raw_study(["best_in_time"])
    raw["grid"]["budget.total_gflops"] = [1e9]
    (cell,) = study_from(raw).cells
    assert (cell.budget.total_gflops, cell.budget.steps_per_task) == (1e9, None)


def test_lists_in_a_strategy_stand_for_every_combination() -> None:
    entry = {"init": ["base", "ema"], "deploy": ["all", "ema"], "technique": ["average", "ties"]}
    cells = study_from(raw_study([entry])).cells
    assert len(cells) == 8
    assert cells[0].id == "init_base-deploy_all-average"


def test_equal_names_are_told_apart_by_what_differs() -> None:
    entries = [
        {"preset": "best_in_time", "params": {"weight": weight}, "ema_seed": seed}
        for weight in (0.1, 0.5)
        for seed in ("base", "first_expert")
    ]
    assert [cell.id for cell in study_from(raw_study(entries)).cells] == [
        "best_in_time-weight0.1",
        "best_in_time-fromfirst_expert-weight0.1",
        "best_in_time-weight0.5",
        "best_in_time-fromfirst_expert-weight0.5",
    ]


def test_parity_is_written_out_in_our_own_parameters_and_told_apart() -> None:
    entries = [
        "best_in_time",
        {"preset": "best_in_time", "parity": "fomo_in_flux"},
        {"init": "ema", "deploy": ["ema", "latest"], "technique": "ties", "parity": "fomo_in_flux"},
        {"name": "mine", "init": "ema", "deploy": "ema", "technique": "slerp", "parity": "fomo_in_flux", "params": {"weight": 0.9}},
    ]  # fmt: skip
    study = study_from(raw_study(entries))
    assert [cell.id for cell in study.cells] == [
        "best_in_time",
        "best_in_time-fomo_in_flux",
        "init_ema-deploy_ema-ties",
        "init_ema-deploy_latest-ties",
        "mine",
    ]
    ours, theirs, folded, double, slerp = (cell.strategy for cell in study.cells)
    assert ours == PRESETS["best_in_time"]
    assert theirs.params == {"logit_scale": "unclamped", "weight": 0.5}
    assert folded.params == double.params == {"logit_scale": "unclamped", "density": 0.3}
    assert (folded.ema_seed, double.ema_seed) == ("base", "first_expert")
    assert slerp.params["weight"] == 0.1
    assert all(cell.strategy.parity is None for cell in study.cells) and study.warnings == ()
    assert study_from(json.loads(json.dumps(study.model_dump(mode="json")))) == study


def test_parity_that_leaves_something_without_effect_warns() -> None:
    entries = [
        {"init": "all", "deploy": "ema", "technique": "average", "params": {"weight": 0.9}, "parity": "fomo_in_flux"},
        {"preset": "continual_finetuning", "parity": "fomo_in_flux"},
    ]  # fmt: skip
    reset, idle = study_from(raw_study(entries)).warnings
    assert "weight = 0.9 is not used" in reset and "weight is 0.5" in reset
    assert "parity: fomo_in_flux has no effect" in idle


def test_preset_keeps_its_parameters_unless_the_technique_changes() -> None:
    entries = [
        {"preset": "offline_merging_weighted", "params": {"logit_scale": "base"}},
        {"preset": "offline_merging_weighted", "technique": "magmax"},
    ]
    first, second = study_from(raw_study(entries)).cells
    assert first.strategy.params == {"schedule": "linear", "logit_scale": "base"}
    assert second.strategy.params == {}
    assert second.id == "offline_merging_weighted-magmax"


def test_mixture_of_a_strategy_wins_over_the_recipe() -> None:
    entry = {"preset": "best_in_time", "mixture": {"update": 0.5, "buffer": 0.5}}
    replaying, plain, default = study_from(raw_study([entry, "continual_finetuning", "best_in_time"])).cells
    assert (replaying.recipe.mixture.buffer, plain.recipe.mixture.buffer) == (0.5, 0.0)
    assert default.recipe.mixture.pretraining == 0.33


def test_name_of_ones_own_and_alias_of_a_technique() -> None:
    entry = {"name": "mine", "init": "base", "deploy": "all", "technique": "lines"}
    (cell,) = study_from(raw_study([entry])).cells
    assert (cell.id, cell.strategy.technique) == ("mine", "lines_task_arithmetic")


@pytest.mark.parametrize(
    ("experts", "kind", "device"),
    [
        ({}, "torch", "cpu"),
        ({"workers": 2}, "deepspeed", "cpu"),
        ({"zero_stage": 1}, "deepspeed", "cpu"),
        ({"gpus": 1}, "deepspeed", "cuda"),
        ({"gpus": 0.5, "engine": "torch"}, "torch", "cuda"),
        ({"engine": "deepspeed"}, "deepspeed", "cpu"),
    ],
)
def test_auto_engine_is_torch_for_one_cpu_worker_only(
    experts: dict[str, Any], kind: str, device: str
) -> None:
    engine = study_from(raw_study(["best_in_time"], resources={"experts": experts})).engine
    assert (engine.kind, engine.device) == (kind, device)


def test_strategies_known_to_diverge_or_to_merge_nothing_warn() -> None:
    entries = [
        {"init": "ema", "deploy": "ema", "technique": "task_arithmetic", "params": {"scale": 1}},
        {"init": "ema", "deploy": "ema", "technique": "task_arithmetic", "params": {"scale": 0.3}},
        {"init": "latest", "deploy": "latest", "technique": "ties"},
    ]
    study = study_from(raw_study(entries))
    assert len(study.warnings) == 2
    assert "2*scale = 2" in study.warnings[0]
    assert "no effect" in study.warnings[1]
    assert len(study.cells) == 3


# --- roles ---------------------------------------------------------------------------------------------------------------


def suite(tmp_path: Path, **roles: list[str]) -> str:
    given = {"pretraining": ["pool"], "adaptation": ["d1", "d2"], "held_out": ["kept"], **roles}
    for name in {name for names in given.values() for name in names}:
        (tmp_path / name).mkdir(exist_ok=True)
    write(tmp_path / "suite.json", json.dumps({"name": "mini", "roles": given}))
    return str(tmp_path)


def test_suite_brings_its_roles_and_the_stream_its_adaptation_sets(tmp_path: Path) -> None:
    raw = raw_study(["best_in_time"], data={"suite": "mini", "root": suite(tmp_path)}, stream={})
    study = study_from(raw)
    assert not study.is_resolved
    roles = study.resolved().roles
    assert (study.resolved().stream.tasks, roles.adaptation) == (("d1", "d2"), ("d1", "d2"))
    assert (roles.pretraining, roles.held_out) == (("pool",), ("kept",))
    raw["stream"] = {"tasks": ["d2"]}
    assert study_from(raw).resolved().roles.adaptation == ("d2",)
    raw["data"]["adaptation"] = ["d1", "d2"]
    assert study_from(raw).resolved().roles.adaptation == ("d1", "d2")
    assert study_from(raw).resolved().is_resolved


def test_resolved_study_survives_being_written_out(tmp_path: Path) -> None:
    raw = raw_study(["best_in_time"], data={"suite": "mini", "root": suite(tmp_path)}, stream={})
    study = study_from(raw).resolved()
    (tmp_path / "suite.json").unlink()
    again = load_study(write(tmp_path / "s.yaml", study.resolved_yaml()))
    assert again == study == again.resolved()


def test_suite_lies_under_data_unless_a_root_is_given() -> None:
    assert study_from(raw_study(["best_in_time"], data={"suite": "mini"})).data_root == "data/mini"


def test_missing_suite_says_how_to_write_it(tmp_path: Path) -> None:
    raw = raw_study(["best_in_time"], data={"suite": "mini", "root": str(tmp_path)})
    with pytest.raises(ConfigError, match="python -m"):
        study_from(raw).resolved()


def test_other_edition_of_the_suite_is_refused_with_what_to_do(tmp_path: Path) -> None:
    study = study_from(
        raw_study(["best_in_time"], data={"suite": "mini", "root": suite(tmp_path)}, stream={})
    )
    ensure_data(study)
    body = json.loads((tmp_path / "suite.json").read_text())
    write(tmp_path / "suite.json", json.dumps(body | {"edition": 1}))
    with pytest.raises(
        UserError, match=r"holds edition 1 .* works with edition 2; write it again with `python -m"
    ):
        ensure_data(study)


UPDATE = {"pretraining": 0.0, "update": 1.0, "buffer": 0.0}


@pytest.mark.fault("F25")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": {"root": "r", "pretraining": ["pool"]}}, "data.held_out: is missing"),
        ({"data": {"root": "r", "held_out": []}}, "data.pretraining: is missing"),
        (
            {"data": {"root": "r", "pretraining": [], "held_out": []}, "stream": {}},
            "stream.tasks: is missing",
        ),
        ({"data": {"root": "r", "pretraining": [], "held_out": ["d1"]}}, "d1 is also a task"),
        (
            {"resources": {"experts": {"workers": 3}}},
            "recipe.batch_size: 64 samples cannot be shared equally by resources.experts.workers: 3; make it a multiple",
        ),
        ({"data": {"root": "r", "pretraining": [], "held_out": ["kept"]}}, "takes a share of 0.33 from it"),
        (
            {
                "resources": {"experts": {"workers": 2}},
                "recipe": {"batch_size": 66, "accumulate": 3, "mixture": UPDATE},
            },
            "",
        ),
        (
            {
                "resources": {"experts": {"workers": 4}},
                "recipe": {"batch_size": 66, "accumulate": 3, "mixture": UPDATE},
            },
            "66 samples cannot be shared equally by resources.experts.workers: 4 in recipe.accumulate: 3 parts each",
        ),
        ({"recipe": {"tf32": True}}, "recipe.tf32: is a format of GPUs, and resources.experts.gpus is 0"),
        (
            {"resources": {"experts": {"zero_stage": 3}}, "recipe": {"ema": 0.9}},
            "recipe.ema: needs parameters that are whole on every worker",
        ),
        (
            {"resources": {"experts": {"zero_stage": 3}}, "recipe": {"compile": True}},
            "recipe.compile: needs parameters that are whole",
        ),
    ],
)
def test_roles_and_resources_that_do_not_fit_are_refused(changes: dict[str, Any], words: str) -> None:
    raw = raw_study(["best_in_time"], **changes)
    if not words:
        study_from(raw).resolved()
        return
    with pytest.raises(ConfigError) as caught:
        study_from(raw).resolved()
    assert words in str(caught.value)


def test_mistake_of_the_recipe_is_said_once_however_many_strategies_share_it() -> None:
    with pytest.raises(ConfigError) as caught:
        study_from(
            raw_study(
                ["continual_finetuning", "best_in_time"],
                recipe={"batch_size": 3, "mixture": {"pretraining": 0.33, "update": 0.34, "buffer": 0.33}},
                resources={"experts": {"workers": 2}},
            )
        ).resolved()
    assert str(caught.value).count("cannot be shared equally") == 1
    assert str(caught.value).count("no sample of a batch") == 1


def test_misspelt_dataset_is_answered_with_the_nearest_that_is_there(tmp_path: Path) -> None:
    for name in ("animals", "wds_photos", "pool", "kept"):
        (tmp_path / name).mkdir()
    data = {"root": str(tmp_path), "pretraining": ["pool"], "held_out": ["kept"]}
    raw = raw_study(["best_in_time"], data=data, stream={"tasks": ["animls", "photos"]})
    with pytest.raises(
        ConfigError, match=r"stream.tasks: no dataset 'animls' .*did you mean animals\?"
    ) as caught:
        study_from(raw).resolved()
    assert len(caught.value.problems) == 1


def test_weights_per_expert_must_be_as_many_as_tasks() -> None:
    entry = {"init": "base", "deploy": "all", "technique": "average", "params": {"weights": [1, 2]}}
    with pytest.raises(ConfigError, match="2 entries but the stream has 3 tasks"):
        study_from(raw_study([entry])).resolved()


# --- overrides -----------------------------------------------------------------------------------------------------------


def test_override_changes_one_value_and_leaves_the_tree_alone() -> None:
    raw = raw_study(["best_in_time"])
    before = json.dumps(raw)
    study = study_from(
        raw, "f", ["grid.seed=[0,1]", "budget.steps_per_task=10", "recipe.lr=1e-4", "model.pretrained=a=b"]
    )
    assert (len(study.cells), study.budget.steps_per_task, study.recipe.lr) == (2, 10, 1e-4)
    assert study.model.pretrained == "a=b"
    assert json.dumps(raw) == before


@pytest.mark.parametrize(
    ("override", "key"),
    [("grid.budget.multiplier=[.5,2]", "budget.multiplier"), ("grid.recipe.lr=[1e-4]", "recipe.lr")],
)
def test_override_of_an_axis_replaces_it(override: str, key: str) -> None:
    raw = raw_study(["best_in_time"])
    raw["grid"]["budget"] = {"multiplier": [4]}
    assert study_from(raw, "f", [override]).grid[key] == yaml_input.split_override(override)[1]


def test_later_override_wins_and_null_takes_back() -> None:
    raw = raw_study(["best_in_time"])
    study = study_from(
        raw, "f", ["recipe.lr=1", "recipe.lr=2", "budget.total_gflops=1e9", "budget.steps_per_task=null"]
    )
    assert (study.recipe.lr, study.budget.total_gflops, study.budget.steps_per_task) == (2, 1e9, None)


@pytest.mark.parametrize(
    "override", ["x", "=3", "recipe..lr=1", "name.x=3", "recipe.lr=[1", "recipe.lr=.nan", "recipe.lr=&a 1"]
)
def test_malformed_override_is_named(override: str) -> None:
    (problem,) = problems(raw_study(["best_in_time"]), override)
    assert problem.startswith("--set")


def test_mistake_by_override_is_told_from_one_in_the_file() -> None:
    assert problems(raw_study(["best_in_time"]), "recipe.lr=-1") == [
        "--set: recipe.lr: -1 must be greater than 0"
    ]
    raw = raw_study(["best_in_time"], recipe={"lr": -1})
    assert problems(raw) == ["f.yaml: recipe.lr: -1 must be greater than 0"]
