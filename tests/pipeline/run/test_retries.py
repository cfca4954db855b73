"""How often a step is tried: as often as the study allows, three times if memory ran out, once if another try cannot help."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.memory import OutOfMemory
from cluster.pool import PlaceLost, WorkerLost
from merge_service.errors import UserError
from merge_service.files import owner_mark, temporary
from pipeline.errors import StepFailed, StepTimeout
from pipeline.run.deadlines import Deadlines
from tests.pipeline.plan_toys import study
from tests.pipeline.run.test_drive import Scene

LIMIT = 3
"""`experts.max_retries` of these studies, the default."""


def drive(scene: Scene, *errors: Exception) -> int:
    """Run a study whose first expert fails with this error. Returns how often that expert was tried."""
    first = next(step for step in scene.plan.steps.values() if step.kind == "train")
    scene.errors[first.fingerprint] = list(errors)
    try:
        scene.drive.run()
    finally:
        left = len(scene.errors[first.fingerprint])
    return len(errors) - left + 1


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(tmp_path, monkeypatch)


@pytest.mark.fault("F1")
def test_step_that_fails_as_often_as_is_allowed_is_tried_once_more_and_succeeds(scene: Scene) -> None:
    assert drive(scene, *[WorkerLost("died")] * LIMIT) == LIMIT + 1
    assert len(scene.ended) == len(scene.plan.steps)


@pytest.mark.fault("F1")
@pytest.mark.parametrize(("error", "kind"), [(WorkerLost("died"), StepFailed), (StepTimeout("silent"), StepTimeout)])  # fmt: skip
def test_step_that_fails_once_more_than_allowed_ends_the_run_with_its_name(
    scene: Scene, error: Exception, kind: type[Exception]
) -> None:
    with pytest.raises(
        kind, match=rf"t1 .*: failed {LIMIT + 1} times, the last time with: {type(error).__name__}"
    ):
        drive(scene, *[error] * (LIMIT + 1))


@pytest.mark.fault("F29")
def test_step_that_runs_out_of_memory_is_tried_thrice_however_many_retries_are_allowed(scene: Scene) -> None:
    with pytest.raises(StepFailed, match="failed 3 times"):
        drive(scene, *[OutOfMemory("its budget is 7 bytes")] * LIMIT)


@pytest.mark.fault("F6")
def test_worker_whose_node_had_gone_before_it_began_does_not_count_as_a_try(scene: Scene) -> None:
    assert drive(scene, *[PlaceLost("gone")] * 9) == 10


def test_mistake_of_the_user_is_not_tried_again(scene: Scene) -> None:
    with pytest.raises(UserError, match="unusable"):
        drive(scene, UserError("tried again"), UserError("unusable"))


@pytest.mark.fault("F30")
def test_step_is_overdue_when_it_was_silent_for_its_timeout_and_every_report_counts_anew(
    tmp_path: Path,
) -> None:
    now = [0.0]
    one: Any = SimpleNamespace(kind="train", fingerprint="f" * 64, model="toy")
    deadlines = Deadlines(
        study(["continual_finetuning"], resources={"experts": {"timeout": 10}}), tmp_path, lambda: now[0]
    )
    deadlines.start(one)
    now[0] = 10.0
    assert not deadlines.overdue(one)
    now[0] = 10.5
    assert deadlines.overdue(one)
    report = tmp_path / one.fingerprint / "progress.json"
    report.parent.mkdir()
    report.write_text("{}")
    assert not deadlines.overdue(one)
    now[0] = 20.5
    assert not deadlines.overdue(one)
    now[0] = 21.0
    assert deadlines.overdue(one)


@pytest.mark.fault("F2")
def test_half_written_threshold_of_a_killed_worker_goes_with_the_run_and_that_of_a_live_one_stays(
    scene: Scene,
) -> None:
    limits = scene.workspace.limits
    limits.mkdir(parents=True)
    alive = temporary(limits / "expert.limits.json")
    host, _, pid = owner_mark().rpartition("-")[0].rpartition("-")
    dead = alive.with_name(alive.name.replace(owner_mark(), f"{host}-{pid}-1"))
    for path in (alive, dead, limits / "expert.limits.json"):
        path.write_text("{}")
    store = scene.workspace.__dict__["store"]
    store.sweep, store.being_written = lambda: [], lambda _: []
    scene.workspace.tidy()
    assert sorted(path.name for path in limits.iterdir()) == sorted([alive.name, "expert.limits.json"])
