"""Rows that the tracker has not received yet, in a small sqlite file beside the store.

Invariant: an appended row is on disk (WAL, synchronous=FULL) before the call returns. It has the timestamp of its record and
never that of its delivery, so delivering it twice adds nothing. Rows are delivered in the order of their sequence numbers.
Delivered rows are marked per destination, so the same rows can be sent to a second tracker later. The file can be deleted at any
time: the next run of the study writes the same rows again from the store.

One host at a time writes it (the driver appends, one flusher marks); any number of readers may count.
"""

import json
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merge_service.faults import point
from pipeline.errors import TrackingError

FILE = "outbox.db"
PLAN, RESULTS = "plan", "results"
"""Keys of `meta`: the plan that ran last, and the plan that results.json in OUT belongs to."""
_BUSY_SECONDS = 10.0
_SCHEMA = """
CREATE TABLE IF NOT EXISTS rows (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL UNIQUE, payload TEXT NOT NULL,
    timestamp_ms INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS delivered (destination TEXT NOT NULL, seq INTEGER NOT NULL,
    PRIMARY KEY (destination, seq)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS rejected (destination TEXT NOT NULL, seq INTEGER NOT NULL, error TEXT NOT NULL,
    PRIMARY KEY (destination, seq)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
"""
_STUDIES = "SELECT payload FROM rows WHERE key LIKE '%/run/study' ORDER BY seq"
_PENDING = "SELECT count(*) FROM rows WHERE seq NOT IN (SELECT seq FROM delivered WHERE destination = ?)"


@dataclass(frozen=True)
class Row:
    """One message for the tracker. `key` identifies it; `replace` rows supersede an earlier row of the same key."""

    key: str
    payload: Mapping[str, Any]
    timestamp_ms: int
    replace: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class Entry:
    """A row as stored in the outbox."""

    seq: int
    key: str
    payload: dict[str, Any]
    timestamp_ms: int


class Outbox:
    """Rows for a tracker, in order. Safe to use from several threads.

    Raises TrackingError if the file is not an outbox or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._floor: dict[str, int] = {}
        try:
            self._db = sqlite3.connect(
                path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_SCHEMA)
        except sqlite3.Error as error:
            raise TrackingError(
                f"{path} cannot be used as the outbox of the tracker: {error}. "
                "Delete it and run the study again; the run writes its rows again from the store."
            ) from error

    def append(
        self, key: str, payload: Mapping[str, Any], timestamp_ms: int, *, replace: bool = False
    ) -> bool:
        """Add one row; False if its key exists already (with `replace`: with the same payload)."""
        return self.extend([Row(key, payload, timestamp_ms, replace)]) == 1

    def extend(self, rows: Iterable[Row]) -> int:
        """Add rows in one transaction; returns the number of new ones. Rows whose key exists are not changed."""
        encoded = [
            (row, json.dumps(row.payload, sort_keys=True, separators=(",", ":"), allow_nan=False))
            for row in rows
        ]
        if not encoded:
            return 0
        with self._transaction() as db:
            added = sum(_insert(db, row, text) for row, text in encoded)
        point("outbox.after_append")
        return added

    def get(self, key: str) -> dict[str, Any] | None:
        """The last payload under a key."""
        found = self._read("SELECT payload FROM rows WHERE key = ?", key)
        return json.loads(found[0][0]) if found else None

    def pending(self, destination: str | None = None) -> int:
        """How many rows a destination (default: this study's) has not received, refused ones included."""
        return int(self._read(_PENDING, self.destination() if destination is None else destination)[0][0])

    def undelivered(self, destination: str, limit: int = 64) -> list[Entry]:
        """The next rows to deliver, in order, without those the destination has refused.

        Leading rows that are done are not read again, because a sweep has tens of thousands.
        """
        query = (
            "SELECT seq, key, payload, timestamp_ms FROM rows WHERE seq > ?"
            " AND seq NOT IN (SELECT seq FROM delivered WHERE destination = ?)"
            " AND seq NOT IN (SELECT seq FROM rejected WHERE destination = ?) ORDER BY seq LIMIT ?"
        )
        with self._lock:
            floor = self._floor.get(destination, 0)
            newest = int(self._read("SELECT coalesce(max(seq), 0) FROM rows")[0][0])
            found = self._read(query, floor, destination, destination, limit)
            self._floor[destination] = found[0][0] - 1 if found else newest
        return [Entry(seq, key, json.loads(payload), stamp) for seq, key, payload, stamp in found]

    def delivered(self, destination: str, *seqs: int) -> None:
        """Mark rows as received by a destination."""
        with self._transaction() as db:
            rows = [(destination, seq) for seq in seqs]
            db.executemany("INSERT OR IGNORE INTO delivered VALUES (?, ?)", rows)

    def reject(self, destination: str, seq: int, error: str) -> None:
        """Set a row aside that a destination refuses, so that it does not block later rows."""
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO rejected VALUES (?, ?, ?)", (destination, seq, error))

    def rejected(self, destination: str) -> list[tuple[str, str]]:
        """(key, error) of every row that was set aside."""
        query = "SELECT key, error FROM rejected JOIN rows USING (seq) WHERE destination = ? ORDER BY seq"
        return [(key, error) for key, error in self._read(query, destination)]

    def retry_rejected(self, destination: str) -> None:
        """Offer refused rows once more."""
        with self._transaction() as db:
            db.execute("DELETE FROM rejected WHERE destination = ?", (destination,))
            self._floor.pop(destination, None)

    def plans(self) -> dict[str, str]:
        """Every plan of this outbox, oldest first: its fingerprint and the name of its parent run."""
        return _plans(self._read(_STUDIES))

    def destination(self) -> str:
        """The name of this study's destination, as last set."""
        return self.meta("destination") or ""

    def meta(self, key: str) -> str | None:
        found = self._read("SELECT value FROM meta WHERE key = ?", key)
        return str(found[0][0]) if found else None

    def set_meta(self, key: str, value: str) -> None:
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def _read(self, query: str, *values: str | int) -> list[tuple[Any, ...]]:
        with self._lock:
            try:
                return self._db.execute(query, values).fetchall()
            except sqlite3.Error as error:
                raise TrackingError(f"the outbox {self.path} cannot be read: {error}") from error

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield self._db
                except BaseException:
                    self._db.execute("ROLLBACK")
                    raise
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                raise TrackingError(f"the outbox {self.path} cannot be written: {error}") from error


def _insert(db: sqlite3.Connection, row: Row, text: str) -> bool:
    if row.replace:
        known = db.execute("SELECT payload FROM rows WHERE key = ?", (row.key,)).fetchone()
        if known is not None and known[0] != text:
            # A new sequence number: the row counts as undelivered again, everywhere.
            db.execute("DELETE FROM rows WHERE key = ?", (row.key,))
    added = db.execute(
        "INSERT OR IGNORE INTO rows (key, payload, timestamp_ms) VALUES (?, ?, ?)",
        (row.key, text, row.timestamp_ms),
    )
    return added.rowcount == 1


@dataclass(frozen=True)
class Glance:
    """Summary of an outbox for readers: rows that its tracker has not received; the names of the parent runs of other plans in
    OUT; the one of those that results.json still belongs to, if it is not the plan that ran last.
    """

    pending: int = 0
    others: tuple[str, ...] = ()
    results_of: str | None = None


def glance(out: Path) -> Glance:
    """The summary of a study directory's outbox; empty if nothing was ever tracked. Reads only.

    Raises TrackingError if the file exists but is not an outbox.
    """
    path = out / FILE
    if not path.exists():
        return Glance()
    try:
        try:
            return _glance(f"{path.resolve().as_uri()}?mode=ro")
        except sqlite3.OperationalError:
            # A WAL database in a read-only directory: no other process writes it either.
            return _glance(f"{path.resolve().as_uri()}?immutable=1")
    except sqlite3.Error as error:
        raise TrackingError(f"{path} is not readable as the outbox of the tracker: {error}") from error


def _glance(uri: str) -> Glance:
    db = sqlite3.connect(uri, uri=True, timeout=_BUSY_SECONDS)
    try:
        meta = dict(db.execute("SELECT key, value FROM meta"))
        pending = int(db.execute(_PENDING, (meta.get("destination", ""),)).fetchone()[0])
        plans = _plans(db.execute(_STUDIES)) if PLAN in meta else {}
    finally:
        db.close()
    others = {plan: name for plan, name in plans.items() if plan != meta[PLAN]}
    return Glance(pending, tuple(others.values()), others.get(meta.get(RESULTS, "")))


def _plans(payloads: Iterable[tuple[Any, ...]]) -> dict[str, str]:
    found = (json.loads(payload) for (payload,) in payloads)
    return {body["plan"]: body["name"] for body in found}
