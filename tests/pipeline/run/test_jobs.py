"""Which merges of a study ask whether their experts come from the base, and that nothing of it is part of a step's identity."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from merge_service.checkpoints import WEIGHTS_FILE
from pipeline.run.jobs import Jobs
from tests.pipeline.plan_toys import facts, make_plan, study

STRATEGIES: list[Any] = [
    {"init": "base", "deploy": "all", "technique": "average"},
    {"init": "base", "deploy": "ema", "technique": "average"},
    {"init": "latest", "deploy": "all", "technique": "average"},
    {"init": "ema", "deploy": "ema", "technique": "average"},
]


def flags(strategy: dict[str, Any], **changes: Any) -> dict[int, bool]:
    """By t: whether a merge takes any experts."""
    asked = study([strategy], **changes)
    plan = make_plan(asked, facts())
    record = SimpleNamespace(path=Path("somewhere"), sha256=lambda name: {WEIGHTS_FILE: "ab"}[name])
    workspace: Any = SimpleNamespace(
        plan=plan, study=asked, scratch=Path("s"), limits=Path("l"), known=lambda fingerprint: record
    )
    jobs = Jobs(workspace)
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
