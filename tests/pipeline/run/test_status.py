"""The status of a run: its content, the end of a watch with the run, and that reading it never blocks another process."""

import io
import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from pipeline.cli.show import status_view, watch_status
from pipeline.results.over_time import gm, ka, zs
from pipeline.run.events import Events
from pipeline.run.status import Look
from pipeline.store.local import Store
from pipeline.workspace.lock import driver_lock, is_held, write_driver
from tests.pipeline.tracked_study import Tracked, finished_study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Tracked:
    return finished_study(tmp_path_factory.mktemp("out"), strategies=("best_in_time",), tasks=("animals",))


def seen(study: Tracked, monkeypatch: pytest.MonkeyPatch, *, hidden: set[str]) -> Look:
    """A look at the study while the store does not have the `hidden` kinds of steps yet."""
    store = Store(study.out / "store")
    there = SimpleNamespace(
        has=lambda kind, fingerprint: kind not in hidden and store.has(kind, fingerprint), record=store.record
    )
    monkeypatch.setattr("pipeline.run.status.open_plan", lambda out: study.plan)
    monkeypatch.setattr("pipeline.run.status.store_of", lambda out: there)
    return Look(study.out)


def test_looks_follow_a_run_from_its_first_step_to_its_end(
    study: Tracked, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = {"train", "merge", "evaluate"}
    look = seen(study, monkeypatch, hidden=hidden)
    expert = next(step for step in study.plan.steps.values() if step.kind == "train")
    with driver_lock(study.out):
        running = {"fingerprint": expert.fingerprint, "kind": "train", "label": expert.label, "began": 0.0}
        write_driver(study.out, {"running": [running]})
        first = look()
        assert first["state"] == "running" and first["steps"]["running"] == 1
        assert first["kinds"]["train"] == {"done": 0, "running": 1, "total": 1}
        assert first["running"][0]["seconds"] > 0
        assert [row["gm"] for row in first["trajectories"]] == [None]
        hidden.clear()
        second = look()
        assert second["running"] == [], "what is in the store runs no more"
        assert second["steps"]["done"] == len(study.plan.steps)
    last = look()
    assert last["state"] == "done" and last["trajectories"][0]["t"] == 1
    scores = study.records[study.plan.trajectories[0].points[1].evaluate].result["scores"]
    expected = gm(ka(scores, study.plan.adaptation), zs(scores, study.plan.held_out))
    assert last["trajectories"][0]["gm"] == expected


def test_look_says_how_much_time_is_gone_and_left_and_what_was_tried_again(
    study: Tracked, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = seen(study, monkeypatch, hidden={"merge", "evaluate"})
    expert = next(name for name, step in study.plan.steps.items() if step.kind == "train")
    lines: list[dict[str, Any]] = [
        {"event": "start", "time": 0.0},
        {"fingerprint": expert, "kind": "train", "start": 100.0, "end": 200.0},
    ]
    (study.out / "timeline.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    events = Events(study.out)
    for kind in ("retry", "start", "retry", "lost", "lost", "waiting"):
        events.add(kind, "x")
    with driver_lock(study.out):
        write_driver(study.out, {"running": []})
        told = look()
        kinds = [step.kind for step in study.plan.steps.values()]
        scores = 3.0 * kinds.count("evaluate")
        assert told["remaining"] == max(scores, 1.0 + 3.0), (
            "an expert took 100 s; other kinds by their rough weight"
        )
        assert told["elapsed"] > 0 and told["share"] == pytest.approx(100 / (101 + scores))
        assert told["troubles"] == {"retry": 1, "lost": 2}, "since the last start"
        paper = Console(file=io.StringIO(), width=140)
        paper.print(status_view(study.out, told))
        assert isinstance(paper.file, io.StringIO)
        shown = paper.file.getvalue()
        assert (
            f"about {told['remaining']:.0f} s left" in shown
            and "1 step tried again, 2 steps begun again" in shown
        )
    assert look()["remaining"] is None, "nobody works on it"


def answers(*states: str) -> Any:
    told = iter(states)

    def look() -> dict[str, Any]:
        state = next(told)
        return {
            "state": state,
            "steps": {"done": 1, "pending": 2},
            "kinds": {},
            "job": {"id": "j", "state": state},
        }

    return look


@pytest.mark.parametrize("terminal", [False, True])
def test_watch_ends_with_the_run(terminal: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    watch_status(
        Path("runs/x"), answers("starting", "running", "running", "failed", "never asked"), 0.0, console
    )
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "runs/x: failed" in said
    if not terminal:
        lines = [line for line in said.splitlines() if "(" in line]
        assert lines == [
            f"runs/x: {state} (1 done, 2 pending)" for state in ("starting", "running", "failed")
        ]


def test_watching_never_keeps_a_run_from_starting(tmp_path: Path) -> None:
    with driver_lock(tmp_path):
        pass
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            is_held(tmp_path)

    watchers = [threading.Thread(target=watch) for _ in range(2)]
    for watcher in watchers:
        watcher.start()
    try:
        for _ in range(20):
            with driver_lock(tmp_path):
                assert is_held(tmp_path)
    finally:
        stop.set()
        for watcher in watchers:
            watcher.join()
