"""What jobs add to steps: which merges require experts that start from the base, and how pictures reach a device; no part of identity."""

from typing import Any

import pytest

from pipeline.run.jobs import Jobs
from tests.pipeline.plan_toys import facts, make_plan, study, workspace_of

STRATEGIES: list[Any] = [
    {"init": "base", "deploy": "all", "technique": "average"},
    {"init": "base", "deploy": "ema", "technique": "average"},
    {"init": "latest", "deploy": "all", "technique": "average"},
    {"init": "ema", "deploy": "ema", "technique": "average"},
]


def jobs_of(strategy: dict[str, Any], **changes: Any) -> tuple[Jobs, Any]:
    """The jobs of a study, and its plan."""
    asked = study([strategy], **changes)
    plan = make_plan(asked, facts())
    return Jobs(workspace_of(asked, plan)), plan


def flags(strategy: dict[str, Any], **changes: Any) -> dict[int, bool]:
    """By t: whether a merge takes any experts."""
    jobs, plan = jobs_of(strategy, **changes)
    merges = [step for step in plan.steps.values() if step.kind == "merge"]
    return {step.t: jobs.merge(step).any_base for step in merges}


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: f"{s['init']}-{s['deploy']}")
def test_merge_asks_where_experts_come_from_while_all_of_them_began_at_the_base(
    strategy: dict[str, Any],
) -> None:
    found = flags(strategy)
    began_at_base = strategy["init"] == "base"
    assert found == {1: False, 2: not began_at_base, 3: not began_at_base}


def test_study_that_takes_any_base_asks_nothing_and_keeps_its_fingerprints() -> None:
    strategy, wanted = STRATEGIES[0], {"merging": {"any_base": True}}
    assert flags(strategy, resources=wanted) == {1: True, 2: True, 3: True}
    plain, free = (make_plan(study([strategy], **more), facts()) for more in ({}, {"resources": wanted}))
    assert list(plain.steps) == list(free.steps)


@pytest.mark.parametrize(("gpus", "loaders", "pace"), [(0, 1, (50, 0.0)), (1, 5, (0, 300.0))])
def test_threads_read_pictures_for_gpus_alone_and_checkpoints_keep_to_the_clock_there(
    gpus: int, loaders: int, pace: tuple[int, float]
) -> None:
    jobs, plan = jobs_of(STRATEGIES[0], resources={"experts": {"gpus": gpus, "loaders": 5}})
    for step in plan.steps.values():
        if step.kind == "train":
            job = jobs.train(step)
            assert job.loaders == loaders and (job.checkpoint_every, job.checkpoint_seconds) == pace
        elif step.kind == "evaluate":
            assert jobs.evaluate(step).loaders == loaders


@pytest.mark.parametrize("asked", [False, True])
def test_activations_are_computed_again_where_resources_say_so(asked: bool) -> None:
    jobs, plan = jobs_of(STRATEGIES[0], resources={"experts": {"activation_checkpointing": asked}})
    train = [jobs.train(step) for step in plan.steps.values() if step.kind == "train"]
    assert train and {job.activation_checkpointing for job in train} == {asked}
