"""The state of a run, from OUT alone: plan, store, lock, outbox.

Invariant: reading changes nothing, and works from another process during the study or long after it ended.
"""

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TypedDict

from pipeline.run.events import Event, read_events
from pipeline.run.progress import TROUBLES, Standings, TrainingProgress, read_progress, worked
from pipeline.run.timing.pace import Pace, learn
from pipeline.run.trace import read_timeline
from pipeline.store.versions import mixed
from pipeline.tracking.outbox import glance
from pipeline.workspace.lock import DriverState, Failure, Running, Waited, is_held, read_driver
from pipeline.workspace.opening import open_plan, store_of

SHOWN, RECKONED = 20, 10_000
"""Events in an answer, and events among which retries and losses are counted."""


class StepCounts(TypedDict):
    """Numbers of steps by state."""

    done: int
    running: int
    failed: int
    pending: int


class KindCounts(TypedDict):
    """Numbers of steps of one kind."""

    done: int
    running: int
    total: int


class RunningNow(Running):
    """A running step: for how many seconds, and its worker's progress file."""

    seconds: float | None
    progress: TrainingProgress


class Standing(TypedDict):
    """The newest scored time step `t` of a trajectory with `tasks` tasks, and GM there."""

    trajectory: str
    t: int
    tasks: int
    gm: float | None


class Status(TypedDict):
    """The state of a run.

    `state` is running while a driver is alive, done when every step is in the store, failed if the last driver recorded a
    failure, and partial otherwise. Of many trajectories those scored last are listed, and `more_trajectories` counts the others.
    `waiting` are steps that another driver carries out. `versions` names the packages of which several versions made artifacts:
    {package: {version: artifacts}}. `events` are the last of OUT/events.jsonl. `other_plans` are earlier plans of OUT, by their
    names in MLflow; `results_of` is the one that results.json still belongs to, if any. `elapsed` and `remaining` are the seconds
    since the driver began and until all is done (None while nothing was measured, or without a driver); `share` is the part of
    all work that is done, in [0, 1]. `troubles` counts the run's retries and losses, by kind.
    """

    state: str
    steps: StepCounts
    kinds: dict[str, KindCounts]
    running: list[RunningNow]
    trajectories: list[Standing]
    more_trajectories: int
    splits: list[str]
    waiting: list[Waited]
    failure: Failure | None
    versions: dict[str, dict[str, int]]
    events: list[Event]
    tracker_pending: int
    other_plans: list[str]
    results_of: str | None
    elapsed: float | None
    remaining: float | None
    share: float
    troubles: dict[str, int]


class Outlook(NamedTuple):
    """Seconds elapsed and remaining, and the part of all work that is done."""

    elapsed: float | None
    remaining: float | None
    share: float


class Look:
    """The state of a run, read repeatedly; steps that were done at the last look are not read again.

    Raises UserError if OUT holds no run.
    """

    def __init__(self, out: Path) -> None:
        self._out, self._plan, self._store = out, open_plan(out), store_of(out)
        self._standings = Standings(self._plan)
        self._done: set[str] = set()
        self._versions: dict[str, dict[str, int]] = {}
        self._kinds = self._plan.kinds
        self._totals = Counter(self._kinds.values())

    def __call__(self) -> Status:
        """The state at present."""
        self._find_done()
        driver, alive = read_driver(self._out), is_held(self._out)
        now = driver if alive else DriverState()
        running = [step for step in now.get("running", []) if step["fingerprint"] not in self._done]
        failure = None if alive else driver.get("failed")
        told, events = glance(self._out), read_events(self._out, RECKONED)
        total, done = len(self._plan.steps), len(self._done)
        state = "running" if alive else "done" if done == total else "failed" if failure else "partial"
        failed = int(bool(failure) and done < total)
        shown = [self._running(step) for step in running]
        outlook = self._outlook(shown, alive)
        kinds_done = Counter(self._kinds[fingerprint] for fingerprint in self._done)
        kinds_running = Counter(step["kind"] for step in running)
        return {
            "state": state,
            "steps": {
                "done": done, "running": len(running), "failed": failed, "pending": total - done - len(running) - failed,
            },
            "kinds": {
                kind: {"done": kinds_done[kind], "running": kinds_running[kind], "total": total}
                for kind, total in self._totals.items()
            },
            "running": shown,
            "trajectories": [
                {"trajectory": name, "t": t, "tasks": tasks, "gm": gm} for name, t, tasks, gm in self._standings.rows()
            ],
            "more_trajectories": self._standings.hidden,
            "splits": list(self._plan.splits),
            "waiting": [step for step in now.get("waiting", []) if step["fingerprint"] not in self._done],
            "failure": failure,
            "versions": mixed(self._versions),
            "events": events[-SHOWN:],
            "tracker_pending": told.pending,
            "other_plans": list(told.others),
            "results_of": told.results_of,
            "elapsed": outlook.elapsed, "remaining": outlook.remaining, "share": outlook.share,
            "troubles": troubles(events),
        }  # fmt: skip

    def _outlook(self, running: Sequence[RunningNow], alive: bool) -> Outlook:
        """Elapsed and remaining time, by the timeline of this plan."""
        lines: list[dict[str, object]] = []
        with suppress(OSError):
            lines = read_timeline(self._out)
        pace = Pace(self._plan.steps)
        learn(pace, lines)
        pace.at_once(step["kind"] for step in running)
        at_work = {
            step["fingerprint"]: worked(step["progress"], pace.seconds(step["fingerprint"]))
            for step in running
        }
        start = max(
            (float(str(line["time"])) for line in lines if line.get("event") == "start"), default=None
        )
        return Outlook(
            time.time() - start if alive and start is not None else None,
            pace.left(self._done, at_work) if alive else None,
            pace.share(self._done, at_work),
        )

    def _running(self, step: Running) -> RunningNow:
        began = step.get("began")
        seconds = None if began is None else max(0.0, time.time() - began)
        return {
            **step,
            "seconds": seconds,
            "progress": read_progress(self._out / "scratch", step["fingerprint"]),
        }

    def _find_done(self) -> None:
        for fingerprint, kind in self._kinds.items():
            if fingerprint in self._done or not self._store.has(kind, fingerprint):
                continue
            self._done.add(fingerprint)
            record = self._store.record(kind, fingerprint)
            if record is None:
                continue
            for package, version in record.versions.items():
                known = self._versions.setdefault(package, {})
                known[version] = known.get(version, 0) + 1
            self._standings.finished(record)


def troubles(events: Iterable[Mapping[str, object]]) -> dict[str, int]:
    """The number of retries and losses since the run's last start, by kind."""
    found: Counter[str] = Counter()
    for event in events:
        if event["kind"] == "start":
            found.clear()
        elif event["kind"] in TROUBLES:
            found[str(event["kind"])] += 1
    return dict(found)


def status_of(out: Path) -> Status:
    """One `Look` at a run."""
    return Look(out)()
