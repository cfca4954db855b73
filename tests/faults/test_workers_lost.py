"""Workers that die, hang, or run out of memory: the study gives the same result, or ends with the name of the step."""

import re
import time
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import (
    WORKER_POINTS,
    Faults,
    created,
    must_be_same,
    results,
    run,
    wait_until,
    workers_of,
)
from tests.world import Cluster, World

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.chaos]
Record = Any

ONE_AT_A_TIME = {"max_running": {"train": 1}}


@pytest.mark.fault("F2")
@pytest.mark.parametrize("point", WORKER_POINTS)
def test_worker_killed_at_a_point_is_replaced_and_nothing_differs(
    point: str, world: World, cluster: Cluster, undisturbed: Path, tmp_path: Path
) -> None:
    faults = Faults(tmp_path).at(point, nth=1 if point.startswith("evaluate") else 2)
    answer = run(world.study(), tmp_path / "out", cluster, faults)
    assert answer.returncode == 0, answer.stderr
    must_be_same(tmp_path / "out", undisturbed, cluster)


@pytest.mark.fault("F1")
def test_worker_killed_three_times_goes_on_from_its_checkpoints(
    world: World, cluster: Cluster, undisturbed: Path, tmp_path: Path, record_property: Record
) -> None:
    faults = Faults(tmp_path).at("train.after_step", do="count").at("train.after_step", nth=3, times=3)
    out = tmp_path / "out"
    answer = run(world.study(schedule=ONE_AT_A_TIME), out, cluster, faults)
    assert answer.returncode == 0, answer.stderr
    assert answer.stderr.count("trying again") == 3
    resumed = [result["resumed_from"] for result in results(out, "train")]
    assert [step for step in resumed if step], "no expert went on from a checkpoint"
    needed = sum(result["steps"] for result in results(out, "train"))
    again = faults.counted("train.after_step") - needed
    assert 0 < again <= 3 * 2, f"{again} steps were done again, checkpoints are made every 2"
    record_property("cases", 3)
    record_property("steps done again after 3 kills (checkpoints every 2)", str(again))
    must_be_same(out, undisturbed, cluster)


@pytest.mark.fault("F1")
def test_worker_killed_more_often_than_allowed_ends_the_run_with_task_and_t(
    world: World, cluster: Cluster, tmp_path: Path
) -> None:
    faults = Faults(tmp_path).at("train.start", times=4)
    answer = run(world.study(schedule=ONE_AT_A_TIME), tmp_path / "out", cluster, faults)
    assert answer.returncode == 1
    assert re.search(r"StepFailed: t1 red: expert .*failed 4 times.*died", answer.stderr), answer.stderr


@pytest.mark.fault("F3")
@pytest.mark.parametrize(("point", "nth"), [("merge.before_commit", 3), ("merge.after_commit", 3)])
def test_merge_actor_killed_late_commits_each_merge_once(
    point: str, nth: int, world: World, cluster: Cluster, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    answer = run(world.study(), out, cluster, Faults(tmp_path).at(point, nth=nth))
    assert answer.returncode == 0, answer.stderr
    assert created(out).keys() == created(undisturbed).keys()
    must_be_same(out, undisturbed, cluster)


@pytest.mark.fault("F30")
@pytest.mark.parametrize(
    ("point", "do"),
    [("train.after_step", "stop"), ("train.after_step", "spin"), ("merge.start", "stop"), ("evaluate.start", "spin")],
)  # fmt: skip
def test_stuck_step_is_ended_at_its_deadline_and_tried_again(
    point: str,
    do: str,
    world: World,
    cluster: Cluster,
    undisturbed: Path,
    tmp_path: Path,
    record_property: Record,
) -> None:
    kind = {"train": "experts", "merge": "merging", "evaluate": "evaluation"}[point.partition(".")[0]]
    resources: dict[str, Any] = {"experts": {"checkpoint_every": 2}}
    resources.setdefault(kind, {})["timeout"] = 20
    began = time.monotonic()
    answer = run(
        world.study(resources=resources), tmp_path / "out", cluster, Faults(tmp_path).at(point, do=do)
    )
    assert answer.returncode == 0, answer.stderr
    assert "no sign of progress for 20 s" in answer.stderr
    record_property("whole run with a deadline of 20 s", f"{time.monotonic() - began:.0f} s")
    must_be_same(tmp_path / "out", undisturbed, cluster)


@pytest.mark.fault("F30")
def test_step_that_is_always_stuck_ends_the_run_and_leaves_no_process(
    world: World, cluster: Cluster, tmp_path: Path, record_property: Record
) -> None:
    resources = {"experts": {"timeout": 12, "max_retries": 1}}
    faults = Faults(tmp_path).at("train.start", do="stop", times=2)
    answer = run(world.study(resources=resources, schedule=ONE_AT_A_TIME), tmp_path / "out", cluster, faults)
    assert answer.returncode == 1
    assert re.search(r"StepTimeout: t1 red: expert .*failed 2 times", answer.stderr), answer.stderr
    took = wait_until(lambda: not workers_of(cluster), "a stopped worker still runs")
    record_property("stopped workers gone after", f"{took:.1f} s")


@pytest.fixture(scope="module")
def undisturbed_pair(world: World, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT of a run whose experts are trained by two ranks each."""
    out = tmp_path_factory.mktemp("pair") / "out"
    answer = run(_pair(world), out, cluster)
    assert answer.returncode == 0, answer.stderr
    return out


def _pair(world: World) -> Path:
    experts = {"workers": 2, "zero_stage": 1, "checkpoint_every": 2, "timeout": 30}
    strategies = ["continual_finetuning"]
    return world.study(resources={"experts": experts}, grid={"strategies": strategies})


@pytest.mark.fault("F30")
@pytest.mark.parametrize("do", ["kill", "stop"])
def test_rank_that_dies_or_hangs_ends_the_other_that_waits_for_it_and_the_step_is_tried_again(
    do: str,
    world: World,
    cluster: Cluster,
    undisturbed_pair: Path,
    tmp_path: Path,
    record_property: Record,
) -> None:
    """Two ranks meet in a collective operation at every step; one never arrives."""
    began = time.monotonic()
    answer = run(
        _pair(world), tmp_path / "out", cluster, Faults(tmp_path).at("train.after_step", nth=3, do=do)
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stderr.count("trying again") == 1, answer.stderr
    record_property("whole run with one of two ranks lost", f"{time.monotonic() - began:.0f} s")
    must_be_same(tmp_path / "out", undisturbed_pair, cluster)


@pytest.mark.fault("F29")
def test_worker_over_its_budget_once_is_tried_again_and_others_are_unharmed(
    world: World, cluster: Cluster, undisturbed: Path, tmp_path: Path
) -> None:
    resources = {"experts": {"checkpoint_every": 2, "memory": "2GB"}}
    faults = Faults(tmp_path).at("train.after_step", nth=3, do="allocate", bytes=3 * 10**9)
    answer = run(world.study(resources=resources), tmp_path / "out", cluster, faults)
    assert answer.returncode == 0, answer.stderr
    assert "OutOfMemory" in answer.stderr and "2,000,000,000 bytes" in answer.stderr
    must_be_same(tmp_path / "out", undisturbed, cluster)


@pytest.mark.fault("F29")
def test_worker_always_over_its_budget_fails_at_the_third_try_with_sizes(
    world: World, cluster: Cluster, tmp_path: Path
) -> None:
    resources = {"experts": {"memory": "2GB", "max_retries": 9}}
    faults = Faults(tmp_path).at("train.start", do="allocate", bytes=3 * 10**9, times=3)
    answer = run(world.study(resources=resources, schedule=ONE_AT_A_TIME), tmp_path / "out", cluster, faults)
    assert answer.returncode == 1
    assert re.search(r"failed 3 times.*OOM.*its budget is 2,000,000,000 bytes", answer.stderr), answer.stderr


@pytest.mark.fault("F1")
def test_worker_killed_on_pools_as_they_are_stored_is_replaced_and_nothing_differs(
    world: World, cluster: Cluster, tmp_path: Path
) -> None:
    """Twice in mid-epoch; also where an expert delivers an average, in parts of a batch."""
    data = {
        "root": str(world.home / "data"),
        "pretraining": ["grey"],
        "held_out": ["grey"],
        "reading": "encoded",
    }
    recipe = {"lr": 1e-3, "batch_size": 12, "precision": "fp32", "accumulate": 2, "ema": 0.9}
    study = world.study(
        data=data | {"cache": str(world.home / "cache")},
        recipe=recipe,
        grid={"strategies": ["continual_finetuning"]},
    )
    assert run(study, tmp_path / "whole", cluster).returncode == 0
    faults = Faults(tmp_path).at("train.after_step", nth=3, times=2)
    answer = run(study, tmp_path / "out", cluster, faults)
    assert answer.returncode == 0, answer.stderr
    must_be_same(tmp_path / "out", tmp_path / "whole", cluster)
