"""What a run leaves in order at its end: nothing of workers that were ended, and everything of others that write."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from merge_service.checkpoints import CONFIG_FILE, WEIGHTS_FILE
from merge_service.files import leftovers
from pipeline.plan.steps import Step
from pipeline.workspace import workspace as workspaces
from pipeline.workspace.workspace import Workspace
from tests.pipeline.plan_toys import facts, make_plan, study


@pytest.fixture
def finished(tmp_path: Path) -> tuple[Workspace, Step]:
    """A study of which one step is in the store."""
    asked, known = study(["offline_merging"], tasks=2), facts(2)
    found = Workspace(asked, tmp_path / "out", make_plan(asked, known), known)
    found.store.prepare()
    step = next(one for one in found.plan.steps.values() if one.kind == "train")
    with found.store.staged(step) as stage:
        (stage / WEIGHTS_FILE).write_bytes(b"x")
        (stage / CONFIG_FILE).write_text("{}")
        found.store.commit(step, stage, {}, seconds=0.0)
    return found, step


def stage_of(workspace: Workspace, step: Step, process: subprocess.Popen[bytes]) -> Path:
    """The staging directory of another process for a step."""
    host = leftovers.owner_mark().partition("-")[0]
    mark = f"{host}-{process.pid}-{leftovers._started(process.pid)}"
    stage = workspace.store.root / ".stage" / f"{step.kind}-{step.fingerprint[:16]}.{mark}.0123"
    stage.mkdir()
    return stage


def asleep(seconds: float) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-S", "-c", f"import time; time.sleep({seconds})"])


def test_stage_of_a_worker_that_is_being_ended_goes_with_the_run(finished: tuple[Workspace, Step]) -> None:
    workspace, step = finished
    with asleep(0.7) as ending:
        stage = stage_of(workspace, step, ending)
        workspace.tidy()
    assert not stage.exists()


def test_stage_of_a_process_that_lives_stays_and_is_not_waited_for_longer_than_allowed(
    finished: tuple[Workspace, Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, step = finished
    monkeypatch.setattr(workspaces, "ENDING_SECONDS", 0.2)
    with asleep(60) as living:
        stage = stage_of(workspace, step, living)
        workspace.tidy()
        assert stage.exists()
        living.kill()


def test_step_of_another_study_in_the_same_store_is_not_waited_for(
    finished: tuple[Workspace, Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, _ = finished
    undone = next(one for one in workspace.plan.steps.values() if one.kind == "merge")
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    with asleep(60) as living:
        stage = stage_of(workspace, undone, living)
        workspace.tidy()
        assert stage.exists() and not slept
        living.kill()
