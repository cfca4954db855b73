"""How far a run is, from what lies in OUT alone: plan, store, lock, outbox.

Invariant: looking changes nothing, and works from another process while the study runs or long after it ended.
"""

import time
from collections import Counter
from pathlib import Path
from typing import Any

from pipeline.run.events import read_events
from pipeline.run.progress import Standings, read_progress
from pipeline.store.versions import mixed
from pipeline.tracking.outbox import glance
from pipeline.workspace.lock import is_held, read_driver
from pipeline.workspace.opening import open_plan, store_of


class Look:
    """A run as it is, look after look; what was done at the last one is not asked for again.

    Raises UserError if OUT holds no run.
    """

    def __init__(self, out: Path) -> None:
        self._out, self._plan, self._store = out, open_plan(out), store_of(out)
        self._standings = Standings(self._plan)
        self._done: set[str] = set()
        self._versions: dict[str, dict[str, int]] = {}
        self._kinds = self._plan.kinds
        self._totals = Counter(self._kinds.values())

    def __call__(self) -> dict[str, Any]:
        """{"state", "steps": {"done", "running", "failed", "pending"}, "kinds": {kind: {"done", "running", "total"}},
        "running", "trajectories": [{"trajectory", "t", "tasks", "gm"}], "more_trajectories", "splits", "waiting": [{"fingerprint", "label",
        "holder"}], "failure", "versions": {package: {version: artifacts}}, "events": [{"time", "kind", "text"}], "tracker_pending",
        "other_plans", "results_of"}.

        `state` is running while a driver lives, done when every step is in the store, failed when the last driver said so,
        and partial otherwise. Of many trajectories those scored last are listed. `waiting` is what another driver carries out,
        `versions` names the packages of which several versions made artifacts, `events` are the last of OUT/events.jsonl.
        `other_plans` are plans that OUT held before its study was changed, by their names in MLflow; `results_of` is the one that
        results.json is still of, if any.
        """
        self._find_done()
        driver, alive = read_driver(self._out), is_held(self._out)
        running, waiting = (driver.get(key, []) if alive else [] for key in ("running", "waiting"))
        running = [step for step in running if step["fingerprint"] not in self._done]
        failure = None if alive else driver.get("failed")
        told = glance(self._out)
        total, done = len(self._plan.steps), len(self._done)
        state = "running" if alive else "done" if done == total else "failed" if failure else "partial"
        failed = int(bool(failure) and done < total)
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
            "running": [self._running(step) for step in running],
            "trajectories": [
                {"trajectory": name, "t": t, "tasks": tasks, "gm": gm} for name, t, tasks, gm in self._standings.rows()
            ],
            "more_trajectories": self._standings.hidden,
            "splits": list(self._plan.splits),
            "waiting": [step for step in waiting if step["fingerprint"] not in self._done],
            "failure": failure,
            "versions": mixed(self._versions),
            "events": read_events(self._out),
            "tracker_pending": told.pending,
            "other_plans": list(told.others),
            "results_of": told.results_of,
        }  # fmt: skip

    def _running(self, step: dict[str, Any]) -> dict[str, Any]:
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


def status_of(out: Path) -> dict[str, Any]:
    """One `Look` at a run."""
    return Look(out)()
