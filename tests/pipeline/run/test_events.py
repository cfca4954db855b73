"""The event log of a run, and the warning about artifacts that other library versions made."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.pool import WorkerLost
from merge_service.errors import UserError
from pipeline.cli.show import status_view
from pipeline.errors import CorruptArtifact
from pipeline.plan import file as plan_file
from pipeline.run.events import FILE, Events, read_events
from pipeline.run.status import status_of
from pipeline.store import versions
from pipeline.store.local import Store
from tests.pipeline.plan_toys import facts, make_plan, study
from tests.pipeline.results.test_results import carry_out
from tests.pipeline.run.test_drive import Scene
from tests.pipeline.store_toys import put


def test_events_are_only_added_and_a_line_cut_by_a_crash_costs_itself_alone(tmp_path: Path) -> None:
    Events(tmp_path).add("start", "first")
    with (tmp_path / FILE).open("a") as stream:
        stream.write('{"time": 1, "kind": "ret')
    Events(tmp_path).add("retry", "t1 a: lost (try 1 of 3)", step="f")
    assert [event["text"] for event in read_events(tmp_path)] == ["first", "t1 a: lost (try 1 of 3)"]
    assert read_events(tmp_path, last=1)[0]["step"] == "f"
    assert (tmp_path / FILE).read_text().startswith('{"time"'), "what was there stays"


def test_log_that_cannot_be_written_or_read_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    Events(tmp_path).add("start", "x")
    assert read_events(tmp_path) == [] and read_events(tmp_path / "nowhere") == []


def test_retries_losses_and_a_tracker_that_goes_are_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(tmp_path, monkeypatch)
    monkeypatch.setattr("pipeline.run.driver.LOOK_SECONDS", -1.0)
    steps = list(scene.plan.steps.values())
    expert = next(step for step in steps if step.kind == "train")
    merge = next(step for step in steps if step.kind == "merge")
    scene.errors[expert.fingerprint] = [ValueError("bad luck"), WorkerLost("its node died")]
    scene.errors[merge.fingerprint] = [CorruptArtifact("flipped")]
    troubles = iter(["server away", "server away", None])
    scene.drive.tracking = _Troubled(scene.drive.tracking, lambda: next(troubles, None))  # type: ignore[assignment]
    scene.drive.run()
    said = [(event["kind"], event["text"]) for event in read_events(tmp_path, last=100)]
    assert ("lost", f"{expert.label}: WorkerLost: its node died (try 1 of 3)") in said
    assert ("retry", f"{expert.label}: ValueError: bad luck (try 2 of 3)") in said
    assert ("lost", f"{merge.label}: CorruptArtifact: flipped (try 1 of 3)") in said
    assert [text for kind, text in said if kind == "tracker"] == [
        "rows wait: server away",
        "rows are delivered again",
    ]


class _Troubled:
    def __init__(self, tracking: Any, trouble: Callable[[], str | None]) -> None:
        self._tracking, self._trouble = tracking, trouble

    def __getattr__(self, name: str) -> Any:
        return self._trouble() if name == "trouble" else getattr(self._tracking, name)


def finished(out: Path) -> Store:
    """A finished run with one artifact that was made by another version of torch."""
    plan, store = make_plan(study(["best_in_time"], tasks=2), facts(2)), Store(out / "store")
    store.prepare()
    plan_file.write(plan, out / "plan.json")
    carry_out(plan, store)
    return store


def test_status_shows_events_and_artifacts_of_several_library_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    out = tmp_path / "out"
    monkeypatch.setattr("pipeline.store.local.here", _versions(["1.0", "2.0"]))
    finished(out)
    Events(out).add("retry", "t1 a: [lost] (try 1 of 3)")
    answer = status_of(out)
    assert answer["versions"].keys() == {"torch"} and answer["versions"]["torch"].keys() == {"1.0", "2.0"}
    assert answer["events"][-1]["kind"] == "retry" and answer["waiting"] == []
    console = Console(record=True, width=200)
    console.print(status_view(out, answer))
    text = console.export_text()
    assert "several library versions: torch 1.0 (" in text and "retry: t1 a: [lost] (try 1 of 3)" in text


def _versions(found: list[str]) -> Callable[[], dict[str, str]]:
    """Versions that alternate from commit to commit."""
    turns = iter(range(10**6))
    return lambda: {"python": "3.11", "torch": found[next(turns) % len(found)]}


def test_artifacts_of_other_versions_are_said_once_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "pipeline.store.local.here", lambda: {"torch": "1.0", "deepspeed": "0.1", "gone": "7"}
    )
    record = put(Store(tmp_path / "store"))
    monkeypatch.setattr(versions, "here", lambda: {"torch": "1.0", "deepspeed": "0.1"})
    assert versions.check([record], False, "x") == versions.check([record], True, "x") == ""
    monkeypatch.setattr(versions, "here", lambda: {"torch": "2.0", "deepspeed": "0.1"})
    text = versions.check([record, record], False, "the store")
    assert "torch 1.0 (2 artifacts)" in text and "torch 2.0" in text and "deepspeed" not in text
    with pytest.raises(UserError, match="--strict-versions"):
        versions.check([record], True, "the store")


def test_what_another_driver_made_meanwhile_with_other_versions_is_logged_once_and_refused_if_strict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(tmp_path, monkeypatch)
    monkeypatch.setattr(versions, "here", lambda: {"torch": "2.0"})
    for fingerprint, step in list(scene.plan.steps.items())[:6]:
        scene.stored[fingerprint] = scene.record(step)
        scene.stored[fingerprint].versions["torch"] = "1.0"
    scene.drive.run()
    said = [event["text"] for event in read_events(tmp_path, last=100) if event["kind"] == "versions"]
    assert len(said) == 1 and "torch 1.0" in said[0]
    (tmp_path / "strict").mkdir()
    strict = Scene(tmp_path / "strict", monkeypatch, strict_versions=True)
    strict.stored.update(scene.stored)
    with pytest.raises(UserError, match="--strict-versions"):
        strict.drive.run()
    assert not [
        json.loads(line) for line in (tmp_path / "strict" / "timeline.jsonl").read_text().splitlines()
    ][1:]
