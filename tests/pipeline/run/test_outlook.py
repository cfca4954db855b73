"""How long a plan would take: from measured steps, and from a calibration."""

import json
from pathlib import Path
from typing import Any

import pytest

from merge_service.errors import UserError
from pipeline.run.schedule import critical_path, ranks
from pipeline.run.timing.outlook import calibrate, estimate, pace_known
from pipeline.run.timing.pace import Pace
from pipeline.workspace.workspace import Workspace
from tests.pipeline.plan_toys import facts, make_plan, study
from tests.pipeline.tracked_study import Tracked, finished_study
from tests.world import World


class Known:
    """A workspace whose store holds some steps of a plan."""

    def __init__(self, tracked: Tracked, done: set[str]) -> None:
        self.plan, self.out, self._records, self._done = tracked.plan, tracked.out, tracked.records, done

    def done(self) -> set[str]:
        return self._done

    def known(self, fingerprint: str) -> Any:
        return self._records[fingerprint]


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Tracked:
    return finished_study(
        tmp_path_factory.mktemp("out"), strategies=("best_in_time",), tasks=("animals", "scripts")
    )


def test_nothing_is_estimated_while_no_step_was_ever_carried_out(tracked: Tracked) -> None:
    known: Any = Known(tracked, set())
    assert estimate(known, pace_known(known)) is None


def test_store_that_knows_how_long_steps_take_says_so_of_the_rest(tracked: Tracked) -> None:
    trained = [name for name, step in tracked.plan.steps.items() if step.kind == "train"]
    known: Any = Known(tracked, {trained[0]})  # records say 2.5 s
    found = estimate(known, pace_known(known))
    kinds = [step.kind for name, step in tracked.plan.steps.items() if name != trained[0]]
    weights = {"train": 2.5, "merge": 0.025, "evaluate": 0.075}
    assert found is not None
    assert found["work"] == pytest.approx(sum(weights[kind] for kind in kinds))
    assert 0 < found["longest_chain"] < found["work"]
    everything: Any = Known(tracked, set(tracked.plan.steps))
    assert estimate(everything, pace_known(everything)) == {"work": 0, "longest_chain": 0}


def test_timeline_of_an_out_comes_before_records(tracked: Tracked) -> None:
    one = next(name for name, step in tracked.plan.steps.items() if step.kind == "train")
    line = {"fingerprint": one, "kind": "train", "start": 100.0, "end": 140.0}
    (tracked.out / "timeline.jsonl").write_text(json.dumps(line) + "\n")
    try:
        assert pace_known(Known(tracked, {one})).seconds(one) == 40.0  # type: ignore[arg-type]
    finally:
        (tracked.out / "timeline.jsonl").unlink()


@pytest.mark.slow
def test_calibration_measures_what_is_needed_and_leaves_no_trace(
    world: World, tmp_path: Path, cli: Any
) -> None:
    out = tmp_path / "out"
    answer = cli("plan", world.study(), "--out", out, "--calibrate", "--json")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)["seconds"]
    assert found["work"] > found["longest_chain"] > 0
    assert answer.err.count("calibrating: ") == 2 and not out.exists()
    assert json.loads(cli("plan", world.study(), "--out", out, "--json").out)["seconds"] is None
    shown = cli("plan", world.study(), "--out", out, "--calibrate").out
    assert "one step after the other, at least" in shown


def test_calibration_refuses_what_it_cannot_measure(world: World, tmp_path: Path) -> None:
    path = world.study(resources={"experts": {"workers": 2}})
    workspace = Workspace.open(path, (), tmp_path / "out", provisional=True)
    with pytest.raises(UserError, match=r"--calibrate: experts of .* over several ranks"):
        calibrate(workspace, Pace(workspace.plan.steps), lambda text: None)


def test_scores_that_complete_a_row_come_before_others_on_which_nothing_waits_either() -> None:
    plan = make_plan(study(["offline_merging", "best_in_time"]), facts())
    before, after = critical_path(plan.steps), ranks(plan, "critical_path")
    assert sorted(after.values()) == sorted(before.values()), "ranks only change places"
    moved = {name for name in plan.steps if before[name] != after[name]}
    assert {plan.steps[name].kind for name in moved} <= {"evaluate"}
    scored = sorted(
        (name for name, step in plan.steps.items() if step.kind == "evaluate"), key=after.__getitem__
    )
    served = {point.evaluate: point.t for one in plan.trajectories for point in one.points}
    times = [served.get(name, 10**6) for name in scored]
    assert times == sorted(times)
