"""Learned merges inside a study: that merges and coefficients are those of files, and that nothing is lost by a crash. Actors without Ray."""

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import temporal_merge as tm
from merge_service.checkpoints import WEIGHTS_FILE
from merge_service.merge import fold
from merge_service.service import Merger
from merge_service.statistics import Statistics
from pipeline.kinds.specs import LearnSpec, MergeSpec
from pipeline.merging.learning import OfTasks, learn_tasks
from pipeline.plan.steps import Step
from pipeline.report.cost import costs, own_costs
from pipeline.run.carriers import CARRIERS
from pipeline.run.jobs import Jobs
from pipeline.store.artifact import Record
from pipeline.study.config import load_study
from pipeline.workspace.workspace import Workspace
from tests.pipeline.run.test_measured_run import carried_out, last_merge, tensors
from tests.world import World
from workers.actors import Worker
from workers.learning.learn import Run, Where
from workers.learning.wanted import Wanted

TASKS = ("red", "green")
METHODS = ["adamerging", "supermerge", "dam", "concrete", "tinting"]
STRATEGIES: list[Any] = [
    {"init": "base", "deploy": "all", "technique": [*METHODS, "average"]},
    {"init": "base", "deploy": "ema", "technique": "adamerging", "params": {"trim": True, "density": 0.5}},
]
HOW = {"steps": 3, "batch_size": 4, "examples": 12, "learning_rate": 0.1}


@pytest.fixture(scope="module")
def ran(
    world: World, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Workspace, dict[str, Record]]]:
    place = tmp_path_factory.mktemp("learned")
    file = world.study(
        name="learned",
        stream={"tasks": [*TASKS]},
        grid={"strategies": STRATEGIES},
        learning=HOW,
        budget={"steps_per_task": 3},
        resources={"experts": {"checkpoint_every": 0}},
    )
    workspace = Workspace.open(file, out=place / "out")
    yield workspace, carried_out(workspace)
    shutil.rmtree(place, ignore_errors=True)


def learn_step(workspace: Workspace, merge: Step) -> Step:
    (found,) = set(dict(MergeSpec.of(merge.spec).statistics).values())
    return workspace.plan.steps[found]


def coefficients(workspace: Workspace, merge: Step) -> Path:
    step = learn_step(workspace, merge)
    return workspace.weights(step.fingerprint) / LearnSpec.of(step.spec).file_of("")


def weights(workspace: Workspace, merge: Step) -> tuple[Path, list[Path]]:
    spec = MergeSpec.of(merge.spec)
    experts = [workspace.weights(expert) / WEIGHTS_FILE for _, expert in spec.members]
    return workspace.weights(spec.base) / WEIGHTS_FILE, experts


def same(one: Path, other: Path) -> None:
    found, made = tensors(one), tensors(other)
    assert found.keys() == made.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(value, made[name], err_msg=name)


@pytest.mark.parametrize("technique", METHODS)
def test_merge_of_a_study_is_the_merge_of_its_files(ran: Any, technique: str, tmp_path: Path) -> None:
    workspace, _ = ran
    step = last_merge(workspace, technique)
    base, experts = weights(workspace, step)
    out = tmp_path / "merged.safetensors"
    tm.merge(technique, experts, base=base, out=out, coefficients=coefficients(workspace, step))
    same(out, workspace.weights(step.fingerprint) / WEIGHTS_FILE)
    with Statistics(coefficients(workspace, step)) as held:
        assert len(held.about.losses) == HOW["steps"] and len(held.about.experts) == len(TASKS)


def test_fold_of_a_study_is_the_fold_of_its_files(ran: Any, tmp_path: Path) -> None:
    workspace, _ = ran
    step = last_merge(workspace, "adamerging", "fold")
    base, (running, expert) = weights(workspace, step)
    out, given = tmp_path / "fold.safetensors", [coefficients(workspace, step)] * 2
    fold("adamerging", {"trim": True, "density": 0.5}, base, running, expert, out, statistics=given)
    same(out, workspace.weights(step.fingerprint) / WEIGHTS_FILE)


def test_step_learns_what_the_command_learns(ran: Any, world: World, tmp_path: Path) -> None:
    workspace, _ = ran
    step = last_merge(workspace, "adamerging")
    base, experts = weights(workspace, step)
    before = [one for one in workspace.plan.steps.values() if one.fingerprint in step.after]
    warm, out = coefficients(workspace, before[0]), tmp_path / "found.safetensors"
    directory = base.parent
    what = OfTasks(experts, directory, load_study(world.study()), TASKS, out, warm)
    learn_tasks(Wanted.of("adamerging", HOW), what)
    same(out, coefficients(workspace, step))
    moved = tensors(out)
    assert any(
        np.abs(value - 0.3).max() > 0.15 for value in moved.values()
    )  # it began where the last one ended


def test_what_is_lost_or_interrupted_is_made_again_with_the_same_bytes(
    ran: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, records = ran
    jobs, store = Jobs(workspace), workspace.store
    monkeypatch.setattr("workers.learning.sources.Where", partial(Where, every=1))
    for merge in (last_merge(workspace, "adamerging", "fold"), last_merge(workspace, "concrete")):
        learned = learn_step(workspace, merge)
        shutil.rmtree(records[learned.fingerprint].path)
        steps = []

        def broken(run: Run, number: int, real: Any = Run.step, steps: list[int] = steps) -> float:
            steps.append(number)
            if steps == [0, 1, 2]:
                raise KeyboardInterrupt
            return real(run, number)

        with monkeypatch.context() as patch:
            patch.setattr(Run, "step", broken)
            job = CARRIERS["learn"].job(jobs, learned)
            with pytest.raises(KeyboardInterrupt):
                Worker(0, 1, 1, "cpu").run(job, learned, store)
            assert (Path(job.scratch) / "progress.json").is_file()
            again = Worker(0, 1, 1, "cpu").run(job, learned, store)
        assert steps == [0, 1, 2, 2] and not Path(job.scratch).exists()  # it went on where it was
        shutil.rmtree(records[merge.fingerprint].path)
        merged = Merger().run(CARRIERS["merge"].job(jobs, merge), merge, store)
        for step, record in ((learned, again), (merge, merged)):
            before = records[step.fingerprint].files
            assert {name: one["sha256"] for name, one in record.files.items()} == {
                name: one["sha256"] for name, one in before.items()
            }
    assert store.verify() == []


def test_cost_of_learning_is_counted_for_every_trajectory_that_uses_it(ran: Any) -> None:
    workspace, records = ran
    plan = workspace.plan
    table = costs(plan, records.values(), []).set_index("kind")
    assert list(table.index) == ["train", "learn", "merge", "evaluate"]
    assert table.steps["learn"] == 6 * 2 and table.gflops["learn"] > 0 and table.bytes_written["learn"] > 0
    own = own_costs(plan, records).set_index("trajectory").gflops
    of = {name.rpartition("-")[2]: value for name, value in own.items() if "deploy_all" in name}
    assert of["average"] < of["adamerging"] == of["supermerge"] < of["dam"]
    summary = workspace.summary()
    assert summary["steps"]["learn"]["unique"] == summary["steps"]["learn"]["cached"] == 12
