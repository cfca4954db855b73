"""Records the driver's events for tracking: one fast call per event, never an error.

Invariant: every row is appended to the outbox before a call returns; nothing here contacts MLflow. Recording a step again adds
nothing, so the driver records every finished step, also those of an earlier run. This makes up for a crash between a commit and
its rows.
"""

import hashlib
from pathlib import Path

from pipeline.errors import TrackingError
from pipeline.plan.steps import Step
from pipeline.store.artifact import Record
from pipeline.tracking.outbox import PLAN, RESULTS, Outbox, Row
from pipeline.tracking.rows.events import Projection
from pipeline.tracking.rows.index import STUDY


class Recorder:
    """Writes a plan's rows into the outbox of `out`.

    Rows that cannot be written (disk full, a broken outbox) are kept and tried again with the next ones; `last_error` holds the
    reason. The study continues: its next run writes the rows again from the store.
    """

    def __init__(self, projection: Projection, outbox: Outbox, out: Path) -> None:
        self.last_error: str | None = None
        self._projection, self._outbox, self._out = projection, outbox, out
        self._kept: list[Row] = []

    def study_started(self, now_ms: int) -> None:
        """Record the study, its trajectories and its base; reopen runs that an earlier run left as failed."""
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
        """Record a step whose record is in the store, from this run or an earlier one."""
        self._append(self._projection.step(step, record))

    def step_failed(self, step: Step, error: str, now_ms: int) -> None:
        """Record a step that was given up; `error` is its message."""
        self._append(self._projection.failed(step, error, now_ms))

    def study_finished(self, table: str | None = None, best: str | None = None) -> None:
        """Record that all steps are done. `table` is the results as CSV, `best` the trajectory to register; `results.json` in OUT
        is attached as well.
        """
        rows = self._projection.finished(table, best)
        if (self._out / "results.json").is_file():
            self._remember(RESULTS)
            rows.insert(0, self._file_row("results.json", rows[-1].timestamp_ms))
        self._append(rows)

    def _remember(self, what: str) -> None:
        """Record this plan as the one that runs, or the one that results.json belongs to."""
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
