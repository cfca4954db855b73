"""configs/fomo_in_flux: consistent in itself, with open_clip, and with what the papers state."""

import math
from pathlib import Path
from typing import Any

import pytest

from pipeline.plan.planner import steps_per_task
from pipeline.study.config import study_from
from pipeline.study.mistakes import validate
from pipeline.study.sections import BudgetSection
from pipeline.study.strategies import read_strategies
from pipeline.study.suites import Suite, read_suite_file
from pipeline.study.yaml_input import read
from workers.training.recipe import REPLAY, Recipe

ROOM = Path(__file__).parents[3] / "configs" / "fomo_in_flux"
SUITE = ROOM / "datasets.yaml"
STUDIES = sorted(path for path in ROOM.glob("*.yaml") if path != SUITE)


@pytest.fixture(scope="module")
def suite() -> Suite:
    return read_suite_file(SUITE)


def test_suite_holds_41_adaptation_sets_22_held_out_sets_and_the_replay_pool(suite: Suite) -> None:
    assert {role: len(names) for role, names in suite.roles.items()} == {
        "pretraining": 1,
        "adaptation": 41,
        "held_out": 22,
    }
    retrieval = {d.name for d in suite.datasets if d.kind == "retrieval"} - set(suite.roles["pretraining"])
    assert retrieval == {"fscoco", "mscoco", "flickr30k"}
    assert set(suite.dates) == {d.name for d in suite.datasets}


def test_class_counts_of_the_held_out_sets_add_up_to_the_papers_total(suite: Suite) -> None:
    counts = [suite.dataset(name).classes for name in suite.roles["held_out"]]
    assert counts.count(None) == 2, "the two retrieval sets"
    assert sum(count for count in counts if count is not None) == 4653


def test_placeholders_add_up_to_the_papers_totals(suite: Suite) -> None:
    described = suite.described()
    adaptation = [described[name] for name in suite.roles["adaptation"]]
    assert sum(len(d.classes) for d in adaptation) == 18_449
    assert sum(d.splits["train"].samples for d in adaptation) == 1_759_782
    assert sum(d.splits["test"].samples for d in adaptation) == 453_020
    assert sum(described[name].splits["test"].samples for name in suite.roles["held_out"]) == 314_419


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_study_says_what_it_reproduces_and_holds_times_recipe_and_budget(path: Path) -> None:
    assert path.read_text().startswith("# ")
    study = read(path)
    assert study["data"]["suite"] == "configs/fomo_in_flux/datasets.yaml"
    recipe, wrong = validate(Recipe, study["recipe"])
    assert not wrong and recipe == Recipe(mixture=REPLAY), "the defaults are TIME's"
    budget, wrong = validate(BudgetSection, study["budget"])
    assert not wrong and budget is not None and budget.total_gflops == 1.8e9


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_strategies_of_a_study_are_valid_and_none_is_known_to_end_badly(path: Path) -> None:
    named, problems, warnings = read_strategies(read(path)["grid"]["strategies"])
    assert named and not problems and not warnings


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_models_of_a_study_are_tags_that_open_clip_has(path: Path) -> None:
    open_clip: Any = pytest.importorskip("open_clip")
    study = read(path)
    for model in (study["model"], *study["grid"].get("model", [])):
        if model["pretrained"].endswith(".safetensors"):
            assert model["config"] == "ViT-S-16" and model["config"] in open_clip.list_models()
        else:
            assert (model["config"], model["pretrained"]) in open_clip.list_pretrained()


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_study_is_valid_and_resolves_with_the_suites_roles(path: Path, suite: Suite) -> None:
    """The roles of the suite stand in for it, and a model axis is checked separately."""
    raw = read(path)
    raw["grid"].pop("model", None)
    raw["resources"].pop("by_model", None)
    raw["data"] = {"root": "/nowhere/fomo", **{role: list(names) for role, names in suite.roles.items()}}
    study = study_from(raw, path.name).resolved()
    assert len(study.roles.adaptation) == 41 and len(study.roles.held_out) == 22
    assert study.cells and not study.warnings


def test_chronological_stream_names_every_adaptation_set_once_and_never_goes_back(suite: Suite) -> None:
    tasks = read(ROOM / "datasets_in_time.yaml")["stream"]["tasks"]
    assert sorted(tasks) == sorted(suite.roles["adaptation"])
    years = [suite.dates[task] for task in tasks]
    assert years == sorted(years, key=str)
    assert (*tasks[:4], *tasks[-1:]) == ("flowers102", "cifar100", "sun397", "cub200", "synthclip106")


def test_grid_of_strategies_holds_every_cell_of_initialization_and_deployment() -> None:
    named, _, _ = read_strategies(read(ROOM / "strategies.yaml")["grid"]["strategies"])
    trained = [n.strategy for n in named if n.strategy.deploy != "base" and not n.strategy.joint]
    for mixture in {strategy.mixture for strategy in trained}:
        cells = {(s.init, s.deploy) for s in trained if s.mixture == mixture}
        every = {(i, d) for i in ("base", "latest", "all", "ema") for d in ("latest", "all", "ema")}
        assert cells == every - {("base", "latest")}, "an isolated expert is no strategy of the paper"


def test_best_models_need_not_share_more_gpus_than_the_batch_divides_into() -> None:
    study = read(ROOM / "models.yaml")
    for model, wanted in study["resources"]["by_model"].items():
        assert model in {m["config"] for m in study["grid"]["model"]}
        assert study["recipe"]["batch_size"] % wanted["experts"]["workers"] == 0


@pytest.mark.parametrize("tasks, steps", [(20, 1420), (50, 568), (100, 284)])
def test_summed_steps_of_a_chain_stay_28400_at_every_horizon(tasks: int, steps: int) -> None:
    found = steps_per_task(BudgetSection(total_gflops=1.8e9), tasks, 512, 63394.7585 / 512, 1.0)
    assert (found, found * tasks) == (steps, 28_400)
    assert math.isclose(found * tasks * 512, 14_540_800), "the samples of the multitask reference"


def test_20_task_grid_is_planned_without_data_or_weights(tmp_path: Path, cli) -> None:
    """28,400 steps per chain; by arithmetic one joint training and two mixtures of four chains that share their first expert."""
    missing = ["--set", f"data.root={tmp_path / 'nowhere'}", "--set", f"data.cache={tmp_path / 'cache'}"]
    answer = cli("plan", ROOM / "strategies.yaml", *missing, "--out", tmp_path / "out")
    assert answer.code == 0, answer.err
    trained = next(line.split() for line in answer.out.splitlines() if line.startswith("train"))
    unique, naive = 1 + 2 * (4 * 20 - 3), 1 + 2 * (11 * 20)
    assert [int(count) for count in trained[1:3]] == [unique, naive]
    assert "28,400" in answer.out and "provisional: 64 datasets" in answer.out
