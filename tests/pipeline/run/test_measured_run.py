"""Merges that see data inside a study: what is measured, on which rows, and that the merges are those of files. Actors without Ray."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import temporal_merge as tm
from merge_service.checkpoints import WEIGHTS_FILE, Checkpoint
from merge_service.errors import UserError
from merge_service.merge import fold
from merge_service.service import Merger
from merge_service.statistics import Statistics
from pipeline.kinds.specs import MeasureSpec, MergeSpec
from pipeline.merging.measuring import OfTask, measure_task
from pipeline.plan.steps import Step
from pipeline.report.cost import costs, own_costs
from pipeline.run.carriers import CARRIERS
from pipeline.run.jobs import Jobs
from pipeline.store.artifact import Record
from pipeline.study.config import load_study
from pipeline.workspace.workspace import Workspace
from tests.world import TASKS, World
from workers.actors import Worker
from workers.evidence import Asked

ALL = ["regmean", "lot", "fisher", "tatr", "regmean_plus", "average"]
STRATEGIES: list[Any] = [
    {"init": "base", "deploy": "all", "technique": ALL},
    {"init": "base", "deploy": "all", "technique": "mats", "params": {"metric": "gram"}},
    {"init": "base", "deploy": "ema", "technique": ["fisher", "wudi"]},
    {"init": "ema", "deploy": "ema", "technique": "regmean"},
]


def carried_out(workspace: Workspace, scored: bool = False) -> dict[str, Record]:
    """Every step, evaluations only if `scored`, by the actors that a cluster would have, one after another."""
    workspace.prepare()
    merger = Merger()
    jobs, actors = Jobs(workspace), {"merge": merger, "expert": merger}
    worker = Worker(0, 1, 1, "cpu")
    for step in (one for one in workspace.plan.steps.values() if scored or one.kind != "evaluate"):
        job = CARRIERS[step.kind].job(jobs, step)
        workspace.keep(actors.get(step.kind, worker).run(job, step, workspace.store))
    return {fp: record for fp in workspace.plan.steps if (record := workspace.known(fp)) is not None}


@pytest.fixture(scope="module")
def ran(
    world: World, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Workspace, dict[str, Record]]]:
    place = tmp_path_factory.mktemp("measured")
    file = world.study(
        name="measured",
        grid={"strategies": STRATEGIES},
        statistics={"examples": 20},
        budget={"steps_per_task": 3},
        resources={"experts": {"checkpoint_every": 0}},
    )
    workspace = Workspace.open(file, out=place / "out")
    yield workspace, carried_out(workspace)
    shutil.rmtree(place, ignore_errors=True)


def last_merge(workspace: Workspace, technique: str, form: str = "merge") -> Step:
    every = [step for step in workspace.plan.steps.values() if step.kind == "merge"]
    return [one for one in every if (one.spec["technique"], one.spec["form"]) == (technique, form)][-1]


def files_of(workspace: Workspace, step: Step) -> tuple[Path, list[Path], list[Path]]:
    """Base, experts and statistics of a merge."""
    spec = MergeSpec.of(step.spec)
    weights = [workspace.weights(expert) / WEIGHTS_FILE for _, expert in spec.members]
    steps = workspace.plan.steps
    measured = [
        workspace.weights(found) / MeasureSpec.of(steps[found].spec).file_of(expert)
        for (_, found), (_, expert) in zip(spec.statistics, spec.members)
    ]
    return workspace.weights(spec.base) / WEIGHTS_FILE, weights, measured


def tensors(file: Path) -> dict[str, np.ndarray]:
    with Checkpoint.open(file) as found:
        return {name: found.read(name) for name in found.tensors}


def test_techniques_share_what_is_measured_and_read_training_splits_of_their_own_task(ran: Any) -> None:
    workspace, _ = ran
    measured = [MeasureSpec.of(s.spec) for s in workspace.plan.steps.values() if s.kind == "measure"]
    counts = {
        kind: sum(one.statistic == kind for one in measured)
        for kind in ("gram", "fisher", "gradient", "layer_gram")
    }
    assert counts == {
        "gram": 5,
        "fisher": 3,
        "gradient": 3,
        "layer_gram": 3,
    }  # of two chains of experts with one first expert
    for one in measured:
        assert {source["split"] for sources in one.data for source in sources} == {"train"}
        assert all(len(sources) == 1 for sources in one.data) and one.examples == 20
    gradients = [one for one in measured if one.statistic == "gradient"]
    assert {model for one in gradients for model in one.models} == set(workspace.plan.bases)
    assert all(one.params["labels"] == "given" for one in gradients)


@pytest.mark.parametrize("technique", ["regmean", "lot", "fisher", "tatr", "regmean_plus"])
def test_merge_of_a_study_is_the_merge_of_its_files(ran: Any, technique: str, tmp_path: Path) -> None:
    workspace, _ = ran
    step = last_merge(workspace, technique)
    base, experts, measured = files_of(workspace, step)
    out = tmp_path / "merged.safetensors"
    tm.merge(technique, experts, base=base, out=out, statistics=measured)
    found, made = tensors(out), tensors(workspace.weights(step.fingerprint) / WEIGHTS_FILE)
    assert found.keys() == made.keys() and len(experts) == len(TASKS)
    for name, value in found.items():
        np.testing.assert_array_equal(value, made[name])
    average = tensors(workspace.weights(last_merge(workspace, "average").fingerprint) / WEIGHTS_FILE)
    assert any(not np.array_equal(value, average[name]) for name, value in made.items())


@pytest.mark.parametrize("technique", ["fisher", "regmean", "wudi"])
def test_fold_of_a_study_is_the_fold_of_its_files(ran: Any, technique: str, tmp_path: Path) -> None:
    workspace, _ = ran
    step = last_merge(workspace, technique, "fold")
    base, experts, measured = files_of(workspace, step)
    given = measured or [None] * len(experts)
    running, before = experts[0], given[0]
    for number in range(1, len(experts)):
        out = tmp_path / f"r{number}.safetensors"
        both = [before, given[number]] if measured else None
        fold(technique, {}, base, running, experts[number], out, statistics=both)
        running, before = out, None
    found, made = tensors(running), tensors(workspace.weights(step.fingerprint) / WEIGHTS_FILE)
    for name, value in made.items():
        np.testing.assert_array_equal(value, found[name])


def test_step_measures_what_the_command_measures(ran: Any, world: World, tmp_path: Path) -> None:
    workspace, _ = ran
    step = next(
        s for s in workspace.plan.steps.values() if s.kind == "measure" and s.spec["statistic"] == "fisher"
    )
    spec = MeasureSpec.of(step.spec)
    asked = Asked("fisher", 20, towers="both")
    model = workspace.weights(spec.models[0])
    study = load_study(world.study())
    found = measure_task(asked, OfTask(model, study, step.task, tmp_path / "fisher.safetensors"))
    with Statistics(workspace.weights(step.fingerprint) / "1.safetensors") as kept:
        assert kept.about.expert_sha256 == found.about.expert_sha256
        for name, value in found.items():
            np.testing.assert_array_equal(kept.get(name), value.astype(np.float32))


def test_what_is_lost_is_made_again_with_the_same_bytes(ran: Any) -> None:
    workspace, records = ran
    jobs, store = Jobs(workspace), workspace.store
    for step in (last_merge(workspace, "regmean", "fold"), last_merge(workspace, "regmean")):
        measured = workspace.plan.steps[MergeSpec.of(step.spec).statistics[-1][1]]
        for one, actor in ((measured, Worker(0, 1, 1, "cpu")), (step, Merger())):
            before = records[one.fingerprint]
            shutil.rmtree(before.path)
            shutil.rmtree(workspace.scratch, ignore_errors=True)  # states are caches
            again = actor.run(CARRIERS[one.kind].job(jobs, one), one, store)
            assert {name: entry["sha256"] for name, entry in again.files.items()} == {
                name: entry["sha256"] for name, entry in before.files.items()
            }
    assert store.verify() == []


def test_cost_of_measuring_is_counted_for_every_trajectory_that_uses_it(ran: Any) -> None:
    workspace, records = ran
    plan = workspace.plan
    table = costs(plan, records.values(), []).set_index("kind")
    assert list(table.index) == ["train", "measure", "merge", "evaluate"]
    assert table.steps["measure"] == 14 and table.gflops["measure"] > 0 and table.bytes_written["measure"] > 0
    own = own_costs(plan, records).set_index("trajectory").gflops
    by_name = {
        name.rpartition("-")[2]: value for name, value in own.items() if "init_base-deploy_all" in name
    }
    assert by_name["average"] < by_name["regmean"] == by_name["lot"] < by_name["regmean_plus"]
    summary = workspace.summary()
    assert summary["steps"]["measure"]["unique"] == summary["steps"]["measure"]["cached"] == 14


def test_given_experts_are_merged_and_scored_like_trained_ones(
    ran: Any, world: World, tmp_path: Path
) -> None:
    workspace, _ = ran
    spec = MergeSpec.of(last_merge(workspace, "regmean").spec)
    given = {task: str(workspace.weights(fp)) for task, (_, fp) in zip(TASKS, spec.members)}
    strategies = [{"init": "base", "deploy": "all", "technique": ["regmean", "average"]}]
    stated = {
        "name": "given",
        "grid": {"strategies": strategies},
        "statistics": {"examples": 20},
        "budget": None,
    }
    file = world.study(**stated, experts=given)
    file.write_text(file.read_text().replace("budget: null\n", ""))
    again = Workspace.open(file, out=tmp_path / "out")
    assert (
        again.summary()["steps"]["train"]["unique"] == 0 and again.summary()["steps"]["expert"]["unique"] == 3
    )
    records = carried_out(again, scored=True)
    for technique in ("regmean", "average"):
        old, new = last_merge(workspace, technique), last_merge(again, technique)
        assert workspace.known(old.fingerprint).sha256(WEIGHTS_FILE) == records[new.fingerprint].sha256(
            WEIGHTS_FILE
        )
    answer = again.write_results()
    assert answer["complete"]
    for one in answer["trajectories"]:
        scores = [step["scores"] for step in one["steps"]]
        gains = [scores[-1][task] - scores[t][task] for t, task in enumerate(TASKS[:-1], start=1)]
        assert one["steps"][-1]["bwt"] == pytest.approx(np.mean(gains))  # the final less the just-learned
    assert again.store.verify() == []


def test_given_experts_must_fit_tasks_and_strategies(ran: Any, world: World, tmp_path: Path) -> None:
    workspace, _ = ran
    base = str(workspace.weights(next(iter(workspace.plan.bases))))
    every = dict.fromkeys(TASKS, base)
    for change, text in (
        ({"experts": {TASKS[0]: base}}, f"has no checkpoint for {TASKS[1]}, {TASKS[2]}"),
        ({"experts": {**every, "rde": base}}, "experts.rde: is no task of a stream"),
        ({"experts": every, "grid": {"strategies": ["best_in_time"]}}, "use init: base"),
        ({"experts": {**every, TASKS[0]: str(tmp_path / "none.safetensors")}}, f"experts.{TASKS[0]}: "),
    ):
        with pytest.raises(UserError, match=text):
            Workspace.open(
                world.study(**{"grid": {"strategies": STRATEGIES[:1]}, **change}), out=tmp_path / "o"
            )
