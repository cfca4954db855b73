"""What the driver tells tracking: one call per thing that happened, quick, and never an error.

Invariant: everything is appended to the outbox before a call returns; nothing here talks to MLflow. Telling a step again
is free, so the driver tells every step that is done, also those that an earlier run did: that makes up for a crash
between a commit and its rows.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import TrackingError
from pipeline.plan.steps import Step
from pipeline.store.artifact import Record
from pipeline.tracking.outbox import PLAN, RESULTS, Outbox, Row
from pipeline.tracking.rows.events import Projection
from pipeline.tracking.rows.index import STUDY


class Recorder:
    """Writes a plan's rows into the outbox of `out`. `notify` is called after new rows (to wake the flusher).

    Rows that cannot be written (disk full, a broken outbox) are kept and tried again with the next ones; `last_error`
    says why. None of it stops the study: its next run makes the rows again from the store.
    """

    def __init__(
        self, projection: Projection, outbox: Outbox, out: Path, notify: Callable[[], None] | None = None
    ) -> None:
        self.last_error: str | None = None
        self._projection, self._outbox, self._out = projection, outbox, out
        self._notify = notify or (lambda: None)
        self._kept: list[Row] = []

    def study_started(self, now_ms: int) -> None:
        """Announce the study, its trajectories and its base; reopen what an earlier run left as failed."""
        self._remember(PLAN)
        rows = self._projection.started(now_ms)
        rows += [
            self._file_row(name, now_ms)
            for name in ("study.yaml", "plan.json")
            if (self._out / name).is_file()
        ]
        self._append(rows + self._reopened(now_ms))

    def _reopened(self, now_ms: int) -> list[Row]:
        rows = (
            self._projection.rows.status(key, "RUNNING", now_ms) for key in self._projection.index.run_keys()
        )
        try:
            return [row for row in rows if (self._outbox.get(row.key) or {}).get("state") == "FAILED"]
        except TrackingError as error:
            self.last_error = str(error)
            return []

    def step_done(self, step: Step, record: Record) -> None:
        """A step's record is in the store, since now or since an earlier run."""
        self._append(self._projection.step(step, record))

    def step_failed(self, step: Step, error: str, now_ms: int) -> None:
        """A step was given up; `error` is its message."""
        self._append(self._projection.failed(step, error, now_ms))

    def study_finished(self, table: str | None = None, best: str | None = None) -> None:
        """All steps are done. `table` is the results as CSV, `best` the trajectory to register; `results.json` of OUT is
        filed as well."""
        rows = self._projection.finished(table, best)
        if (self._out / "results.json").is_file():
            self._remember(RESULTS)
            rows.insert(0, self._file_row("results.json", rows[-1].timestamp_ms))
        self._append(rows)

    def _remember(self, what: str) -> None:
        """That the plan that runs, or that results.json is of, is this one."""
        try:
            self._outbox.set_meta(what, self._projection.index.fingerprint)
        except TrackingError as error:
            self.last_error = str(error)

    def _file_row(self, name: str, stamp: int) -> Row:
        digest = hashlib.sha256((self._out / name).read_bytes()).hexdigest()
        return self._projection.rows.artifact(STUDY, Path(name).name, stamp, path=name, sha256=digest)

    def _append(self, rows: list[Row]) -> None:
        self._kept += rows
        try:
            self._outbox.extend(self._kept)
        except TrackingError as error:
            self.last_error = str(error)
            return
        self._kept = []
        self._notify()
