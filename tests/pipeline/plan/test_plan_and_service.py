"""A study and the live service make the same merges of the same experts: equal bytes after every arrival."""

from pathlib import Path

import numpy as np
import pytest

from merge_service.checkpoints import WEIGHTS_FILE, sha256_of
from merge_service.merging import Member, MergeJob
from merge_service.service import Merger, MergeService
from merge_service.timelines import Strategy
from pipeline.plan.steps import BASE, Plan
from tests.merge_service import toys
from tests.pipeline.plan_toys import facts, make_plan, study

TASKS = 3
STRATEGIES = [
    Strategy("base", "all", "ties", {"density": 0.5}),
    Strategy("base", "ema", "dare_ties", {"density": 0.5}, "first_expert"),
    Strategy("all", "ema", "average", {"schedule": "linear", "weight": 0.25}),
    Strategy("ema", "latest", "slerp"),
    Strategy("all", "latest", "average", {"weights": [1, 2, 3]}),
]


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and an expert per task, as directories."""
    room, rng = tmp_path_factory.mktemp("stream"), np.random.default_rng(3)
    base = toys.towers(rng)
    for t in range(TASKS + 1):
        toys.save(room / f"{t}" / WEIGHTS_FILE, base if t == 0 else toys.moved(rng, base, spread=3))
        (room / f"{t}" / "open_clip_config.json").write_text("{}")
    return [room / f"{t}" for t in range(TASKS + 1)]


def merged_by_plan(plan: Plan, stream: list[Path], room: Path) -> dict[str, Path]:
    """Every artifact of a plan's only trajectory by fingerprint: the given experts, and the merges made of them."""
    (trajectory,) = plan.trajectories
    made = {trajectory.base: stream[0], BASE: stream[0]}
    made |= {point.train: stream[point.t] for point in trajectory.points if point.train}
    merger = Merger()
    for step in (step for step in plan.steps.values() if step.kind == "merge"):
        base, *members = (
            Member(name, made[fp], sha256_of(made[fp]))
            for name, fp in [("base", step.spec["base"]), *step.spec["inputs"]]
        )
        made[step.fingerprint] = room / step.fingerprint
        job = MergeJob(
            step.slug, step.spec["technique"], step.spec["params"], step.spec["form"], base, tuple(members),
            1, str(room / "scratch"), str(room / "limits"),
        )  # fmt: skip
        merger.merge(job, made[step.fingerprint])
    return made


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: f"{s.init}-{s.deploy}-{s.technique}")
def test_plan_and_service_give_the_same_bytes(strategy: Strategy, stream: list[Path], tmp_path: Path) -> None:
    written = {"init": strategy.init, "deploy": strategy.deploy, "technique": strategy.technique}
    plan = make_plan(
        study([{**written, "params": dict(strategy.params), "ema_seed": strategy.ema_seed}], TASKS), facts()
    )
    made = merged_by_plan(plan, stream, tmp_path)
    (trajectory,) = plan.trajectories
    with MergeService(strategy, stream[0], tmp_path / "service") as service:
        for t in range(1, TASKS + 1):
            service.arrive(t, stream[t])
            point = trajectory.points[t]
            assert point.init is not None
            assert sha256_of(service.deployed(t)) == sha256_of(made[point.deployed])
            assert sha256_of(service.initial(t)) == sha256_of(made[point.init])
