"""Follows the log of a service and delivers its versions and aliases to MLflow.

Rows go to an outbox beside the log, from where the tracker of studies sends them. The number of the last entry whose rows are in the
outbox is kept there too.

Invariant: the log is only read, and nothing of the service waits for MLflow. The number is written after the rows, so after a crash the
rows of at most one entry are made again, and they are the same rows. An outbox that is lost is filled again from the log, and finds
in MLflow what was there.
"""

from pathlib import Path

from merge_service.faults import point
from merge_service.live import State, apply
from pipeline.service.config import ServiceConfig
from pipeline.service.log import Log
from pipeline.service.registry.rows import Registered
from pipeline.tracking.outbox import FILE, Outbox
from pipeline.tracking.tracker import Sink, Tracker

CURSOR = "log_seq"
"""Key of the outbox's `meta`: the last entry whose rows are there."""


class Registry:
    """The registry of one service; `place` is its directory. Raises TrackingError if the outbox there cannot be used."""

    def __init__(self, place: Path, log: Log, config: ServiceConfig, sink: Sink | None = None) -> None:
        options = config.tracking
        self._log, self._config, self._state = log, config, State()
        self.outbox = Outbox(place / FILE)
        self.tracker = Tracker(place, self.outbox, uri=options.uri, experiment=options.experiment, sink=sink)
        self._rows: Registered | None = None

    def follow(self) -> int:
        """Put the rows of all new entries into the outbox; returns the number of the last entry.

        Raises TrackingError if the outbox cannot be written; the same call goes on from there. Raises BrokenLog.
        """
        done = int(self.outbox.meta(CURSOR) or 0)
        for entry in self._log.entries(self._state.seq):
            if entry.seq > self._state.seq + 1:
                break  # entries were sealed between two looks; the next call reads them there
            after = apply(self._state, entry)
            if self._rows is None:
                model = self._config.tracking.model or self._config.name
                self._rows = Registered(model, entry.sha256, self._config.timeline)
            rows = self._rows.of(self._state, entry, after) if entry.seq > done else []
            if rows:
                self.outbox.extend(rows)
                point("registry.before_cursor")
                self.outbox.set_meta(CURSOR, str(entry.seq))
            self._state = after
        return self._state.seq

    def close(self, patience: float = 2.0) -> int:
        """Deliver what can be delivered soon; returns the number of rows that wait for the next start."""
        try:
            return self.tracker.close(timeout=10 * patience, patience=patience)
        finally:
            self.outbox.close()
