"""plan.json: its size grows with the steps of the plan, it gives an equal plan, and steps are parsed only when used."""

import json
from pathlib import Path
from typing import Any

import pytest

from merge_service.errors import UserError
from pipeline.errors import PlanError, StorageFull
from pipeline.plan import file as plan_file
from pipeline.plan.file import decode, encode
from pipeline.plan.steps import Plan
from pipeline.workspace.opening import open_plan
from tests.pipeline.plan_toys import facts, make_plan, study

STRATEGIES = [
    "zero_shot",
    "best_in_time",
    {"init": "base", "deploy": "all", "technique": ["ties", "average"]},
]


def long_plan(tasks: int, strategies: list[Any] | None = None, **changes: Any) -> Plan:
    return make_plan(study(strategies or STRATEGIES, tasks, **changes), facts(tasks))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"grid": {"strategies": [*STRATEGIES, "multitask"], "seed": [0, 1]}},
        {"stream": {"order": "random", "chunks": 5, "seed": 1, "tasks": [f"d{t}" for t in range(1, 7)]}, "grid": {"strategies": STRATEGIES, "model": [{"config": "a"}, {"config": "b"}]}},
    ],
)  # fmt: skip
def test_plan_is_the_same_plan_when_it_is_read_again(changes: dict[str, Any], tmp_path: Path) -> None:
    plan = long_plan(6, **changes)
    plan_file.write(plan, tmp_path / "plan.json")
    lazy, eager = (
        plan_file.read(tmp_path / "plan.json"),
        decode(json.loads((tmp_path / "plan.json").read_text())),
    )
    assert eager == plan and decode(json.loads(json.dumps(encode(plan)))) == plan
    assert list(lazy.steps.items()) == list(plan.steps.items()) and lazy.kinds == plan.kinds
    assert lazy.trajectories == plan.trajectories and lazy.classes == plan.classes
    assert lazy.fingerprint == plan.fingerprint


def test_length_of_the_file_grows_with_the_steps_and_not_with_their_lists() -> None:
    short, long = (len(json.dumps(encode(long_plan(tasks)))) for tasks in (30, 120))
    assert long < 4.5 * short
    chunked = [
        len(json.dumps(encode(make_plan(study(STRATEGIES, 3, stream={"order": "random", "seed": 1, "chunks": n, "tasks": ["d1", "d2", "d3"]}), facts(3), 120))))
        for n in (30, 120)
    ]  # fmt: skip
    assert chunked[1] < 4.5 * chunked[0]


def test_status_takes_no_step_apart(tmp_path: Path) -> None:
    plan_file.write(long_plan(4), tmp_path / "plan.json")
    head, steps = (tmp_path / "plan.json").read_text().split('"steps": [', 1)
    (tmp_path / "plan.json").write_text(head + '"steps": [' + steps.replace('"slug"', '"slag"'))
    plan = open_plan(tmp_path)
    assert plan.kinds and len(plan.steps) == len(plan.kinds) and plan.trajectories
    with pytest.raises(PlanError, match="malformed"):
        list(plan.steps.values())


@pytest.mark.parametrize("keep", [0.02, 0.5, 0.9, 0.999])
def test_plan_that_is_cut_is_refused_with_what_to_do(keep: float, tmp_path: Path) -> None:
    plan_file.write(long_plan(4), tmp_path / "plan.json")
    data = (tmp_path / "plan.json").read_bytes()
    (tmp_path / "plan.json").write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(UserError, match="run the study again"):
        open_plan(tmp_path)


def test_older_format_is_refused_and_its_study_is_known_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(
        json.dumps({"format": 2, "fingerprint": "f", "study": 'a "b"', "steps": []})
    )
    with pytest.raises(PlanError, match="format 2"):
        open_plan(tmp_path)
    assert plan_file.study_of(tmp_path / "plan.json") == 'a "b"'
    assert plan_file.study_of(tmp_path / "nothing.json") is None


def test_full_disk_leaves_the_old_plan_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan_file.write(long_plan(2), tmp_path / "plan.json")
    before = (tmp_path / "plan.json").read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageFull, match=r"plan\.json: no room in .*bytes are free"):
        plan_file.write(long_plan(3), tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
