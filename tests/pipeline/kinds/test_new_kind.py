"""A kind of step that the package lacks: with two rows, plan, store, schedule, workers and status support it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self, TypedDict

import pytest

from cluster.capacity import Shape
from cluster.pool import Pool
from pipeline.identity import step_fingerprint
from pipeline.kinds.table import KINDS, STEPS, StepKind
from pipeline.plan import planner, steps
from pipeline.plan.file import read, write
from pipeline.plan.steps import Plan, Step
from pipeline.run.carriers import CARRIERS, Carrier, Lane
from pipeline.run.deadlines import Deadlines
from pipeline.run.lanes import Lanes
from pipeline.run.schedule import Schedule, ranks
from pipeline.run.status import status_of
from pipeline.store.local import Store
from pipeline.study.config import Study
from tests.pipeline.plan_toys import facts, make_plan, study
from tests.pipeline.store_toys import ToyStep, put


@dataclass(frozen=True)
class CountSpec:
    """How many weights of a model are zero."""

    kind: ClassVar[str] = "count"
    version: int
    model: str

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> Self:
        return cls(**spec)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def inputs(self) -> dict[str, str]:
        return {"model": self.model}


class CountResult(TypedDict):
    """What was counted."""

    zeros: int


class Counter:
    """The actor."""


def lane(step: Step, resources: Any, series: Any) -> Lane:
    return Lane("counters", step.kind, "counters", Shape(1, 1), None)


ROW = StepKind("count", 1, CountSpec, CountResult, weight=2.0)
CARRIER = Carrier(
    "a count", "evaluation", lane, lambda lane, patient: Pool(lane.pool, Counter, lambda actor, _: actor.remote(), lane.shape),
    lambda jobs, step: CountSpec.of(step.spec), lambda step, resources: 60.0, lambda result: f"{result['zeros']} zeros",
)  # fmt: skip


@pytest.fixture
def one(monkeypatch: pytest.MonkeyPatch) -> Study:
    """A study of a package with the two rows."""
    monkeypatch.setitem(KINDS, ROW.name, ROW)
    monkeypatch.setitem(CARRIERS, ROW.name, CARRIER)
    for module in (planner, steps):
        monkeypatch.setattr(module, "STEPS", (*STEPS, ROW.name))
    return study(["best_in_time"], schedule={"max_running": {"train": 2}})


@pytest.fixture
def plan(one: Study) -> Plan:
    """Its plan, with a step of the new kind after the last merge."""
    found = make_plan(one, facts())
    merge = [step for step in found.steps.values() if step.kind == "merge"][-1]
    spec = CountSpec(ROW.revision, merge.fingerprint)
    fingerprint = step_fingerprint(ROW.name, spec.to_json())
    step = Step(
        ROW.name, fingerprint, "t3-count", "t3: zeros of the merge", 3, "d3", spec.to_json(), spec.inputs()
    )
    return replace(found, steps={**found.steps, fingerprint: step})


def count_of(plan: Plan) -> Step:
    return next(step for step in plan.steps.values() if step.kind == ROW.name)


def test_plan_counts_the_step_and_its_file_gives_it_back(plan: Plan, tmp_path: Path) -> None:
    assert plan.summary()["steps"]["count"] == {"unique": 1, "naive": 0, "cached": 0}
    write(plan, tmp_path / "plan.json")
    again = read(tmp_path / "plan.json")
    assert again.steps[count_of(plan).fingerprint] == count_of(plan) and again.kinds == plan.kinds


def test_step_gets_its_lane_and_pool_and_starts_after_what_it_reads(
    one: Study, plan: Plan, tmp_path: Path
) -> None:
    step, lanes = count_of(plan), Lanes(one, plan.steps)
    schedule = Schedule(plan.steps, set(), lanes.of, ranks(plan, "critical_path"))
    assert schedule.first("counters") is None
    schedule.finish(step.spec["model"])
    assert (schedule.first("counters") or ("", ""))[1] == step.fingerprint
    assert lanes.pools(patient=False)["counters"].shape == Shape(1, 1)
    assert (lanes.most_of(ROW.name), lanes.most_of("train")) == (None, 2)
    assert Deadlines(one, tmp_path).limit(step) == 60.0
    assert CARRIERS[step.kind].headline({"zeros": 7}) == "7 zeros"


def test_store_takes_the_artifact_and_status_sees_it(plan: Plan, tmp_path: Path) -> None:
    store, step = Store(tmp_path / "store"), count_of(plan)
    store.prepare()
    merged = put(store, ToyStep("merge"))
    step = replace(step, inputs={"model": merged.fingerprint})
    write(plan, tmp_path / "plan.json")
    record = store.make(step, lambda stage: CountResult(zeros=(stage / "zeros").write_text("7")))
    assert record.result == {"zeros": 1} and store.verify() == []
    assert status_of(tmp_path)["kinds"]["count"] == {"done": 1, "running": 0, "total": 1}
