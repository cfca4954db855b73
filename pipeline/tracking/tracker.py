"""Delivers the outbox to MLflow in the background, without slowing the study down.

One thread per study directory (one process at a time, by a lock file) delivers rows in order, retries with its own backoff, and
marks a row as delivered only after the server has it. A row that the server refuses for good is set aside, counted as pending,
and offered again by `sync`.

Invariant: callers use only the outbox. Delivery can be interrupted at any instruction: a row that was sent but not marked is sent
again and changes nothing.
"""

import contextlib
import fcntl
import hashlib
import math
import os
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from merge_service.faults import point
from pipeline.console import WARNING, complain
from pipeline.errors import ConfigError, TrackingError
from pipeline.files.disk import NO_LOCKS
from pipeline.study.addresses import CREDENTIALS, redact, refuse_secret
from pipeline.tracking.mlflow.client import Limit
from pipeline.tracking.mlflow.local import LOCAL_ARTIFACTS, LOCAL_DB, follow_home, local_uri, make_local_store
from pipeline.tracking.mlflow.sink import MlflowSink, Sent
from pipeline.tracking.mlflow.ui import DOOR
from pipeline.tracking.outbox import FILE, Entry, Outbox
from pipeline.tracking.rows.index import STUDY
from pipeline.tracking.rows.rows import Rows

LOCK = "tracking.lock"
_FIRST_BACKOFF, _LAST_BACKOFF = 0.5, 30.0
_IDLE_SECONDS = 1.0
AT_ONCE = 500
"""Most rows of one transaction. The outbox is read once a second, so many rows go together while a study runs."""
SYNC_PATIENCE = 15.0
"""Seconds that a call for delivery waits for a failing tracker: longer than a study that ends, and as long as a request may take."""
SAY_SECONDS = 10.0
_LOCAL = "local"


class Sink(Protocol):
    """The receiver of rows. `deliver` yields rows as soon as they are safe, and raises TrackingError at the first that fails for
    now.
    """

    def deliver(self, entries: Sequence[Entry]) -> Iterable[Sent]: ...

    def forget(self) -> None: ...


class Tracker:
    """The flusher of one study. `uri` None keeps MLflow's store inside `out`.

    `remember` makes this the destination of `status`, `sync` and `ui`. `on_sent` may be set; it is called between sending a row
    and marking it (tests place crashes there). Raises ConfigError for a URI that holds a password; later errors are in
    `last_error`.
    """

    def __init__(
        self,
        out: Path,
        outbox: Outbox,
        *,
        uri: str | None,
        experiment: str,
        sink: Sink | None = None,
        remember: bool = True,
    ) -> None:
        self.last_error: str | None = None
        self._out, self._outbox = out, outbox
        _refuse_password(uri)
        self._destination = destination_name(uri, experiment)
        if remember:
            _remember(outbox, uri, experiment)
        self._limit = Limit()
        self._sink: Sink = sink or MlflowSink(out, uri, experiment, self._limit)
        self.on_sent: Callable[[Entry], None] = lambda entry: None
        self._wake, self._stop = threading.Event(), threading.Event()
        self._failures = 0
        self._holds = True
        self._refusal: str | None = None
        self._second_chance = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start delivery in the background. Returns at once, before MLflow is imported."""
        self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)
        self._thread.start()

    def pending(self) -> int:
        return self._outbox.pending(self._destination)

    def close(
        self, timeout: float = 60.0, patience: float = 2.0, say: Callable[[int], None] | None = None
    ) -> int:
        """Wait for pending rows while delivery makes progress, then stop; returns the number of rows still pending.

        Waits at most `timeout` seconds, and at most `patience` seconds without a delivered row while the tracker fails. With
        SYNC_PATIENCE it waits as long as a request may take, every answer counts as progress, and another process that delivers
        must make progress as well. `say` is called from time to time with the number of pending rows. If the outbox itself has
        become unreadable the result is 1, with the reason in `last_error`: its rows can be written again.
        """
        try:
            self._wait_for_delivery(timeout, patience, say or (lambda left: None))
            return self.pending()
        except TrackingError as error:
            self.last_error = str(error)
            return 1
        finally:
            self._stop.set()
            self._wake.set()
            if self._thread is not None:
                # Joined only briefly: a request that hangs must not keep the study from ending.
                self._thread.join(timeout=0.2)

    def _wait_for_delivery(self, timeout: float, patience: float, say: Callable[[int], None]) -> None:
        began = moved = said = time.monotonic()
        left = self.pending()
        self._wake.set()
        while self._alive():
            second_chance, now, pending = self._second_chance, time.monotonic(), self.pending()
            if not second_chance and pending <= self._refused():
                break
            if pending < left:
                left, moved = pending, now
            stuck, enough = self._failures > 0, patience
            if patience >= SYNC_PATIENCE:
                request = self._limit.seconds if self._holds else self._limit.longest
                stuck, enough = stuck or not self._holds, max(patience, 1.5 * request)
                moved = max(moved, self._limit.moved)
            if now > began + timeout or (stuck and now > moved + enough):
                break
            if now > said + SAY_SECONDS:
                said = now
                say(pending)
            time.sleep(0.05)

    def _refused(self) -> int:
        return len(self._outbox.rejected(self._destination))

    def _alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._outbox.retry_rejected(self._destination)
            while not self._stop.is_set():
                wait = _IDLE_SECONDS
                with FlushLock(self._out) as held:
                    self._holds = held
                    if held:
                        # Another process may have delivered since we last held the lock.
                        self._sink.forget()
                        wait = self._deliver_while_healthy()
                    else:
                        self.last_error = "another process is delivering this study's rows"
                self._pause(wait)
        except (
            TrackingError
        ) as error:  # the outbox itself failed; its rows can be written again from the store
            self.last_error = str(error)

    def _deliver_while_healthy(self) -> float:
        """Deliver until stopped or until an error; returns the seconds to wait before the next attempt."""
        while not self._stop.is_set():
            wait = self._deliver_some()
            if self._failures:
                return wait
            self._pause(wait)
        return 0.0

    def _deliver_some(self) -> float:
        """Deliver pending rows; returns the seconds to wait before the next look."""
        entries = self._outbox.undelivered(self._destination, limit=AT_ONCE)
        try:
            for sent in self._sink.deliver(entries) if entries else ():
                self._mark(sent)
                if self._stop.is_set():
                    return 0.0
        except TrackingError as error:
            self.last_error = redact(str(error))
            self._failures += 1
            return min(_FIRST_BACKOFF * 2.0 ** (self._failures - 1), _LAST_BACKOFF)
        if len(entries) == AT_ONCE:
            return 0.0
        if not self._second_chance:
            return _IDLE_SECONDS
        # The rows first: `close` ends as soon as it sees refused rows alone and no chance ahead.
        self._outbox.retry_rejected(self._destination)
        self._second_chance, self._refusal = False, None
        return 0.0

    def _mark(self, sent: Sent) -> None:
        """Mark rows in the outbox as delivered or refused."""
        point("tracking.after_send")
        if sent.refused is not None:
            self.last_error = self._refusal = redact(sent.refused)
            for entry in sent.entries:
                self._outbox.reject(self._destination, entry.seq, self._refusal)
            return
        for entry in sent.entries:
            self.on_sent(entry)
        self._outbox.delivered(self._destination, *(entry.seq for entry in sent.entries))
        self._failures, self.last_error = 0, self._refusal
        # The reason of a refusal may be gone now, e.g. the row's run may exist.
        self._second_chance = self._refusal is not None

    def _pause(self, seconds: float) -> None:
        if seconds and not self._stop.is_set():
            self._wake.wait(seconds)
            self._wake.clear()


class FlushLock:
    """Held by the one process that delivers a study's rows; `with` yields whether it is held here. The kernel frees it when the
    process ends.
    """

    def __init__(self, out: Path) -> None:
        self._path = out / LOCK
        self._handle: int | None = None

    def __enter__(self) -> bool:
        try:
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise TrackingError(f"{self._path} cannot be opened: {error}") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Without locks two processes may deliver the same row: the second delivery changes nothing.
            if error.errno not in NO_LOCKS:
                os.close(handle)
                return False
        self._handle = handle
        return True

    def __exit__(self, *exception: object) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def settle(out: Path) -> None:
    """Update the addresses of a tracking store after OUT was moved or copied, and say so. If another process delivers at the
    moment, that process does it.
    """
    with contextlib.suppress(TrackingError), FlushLock(out) as held:
        before = follow_home(out, wait_seconds=1.0) if held else None
        if before is not None:
            complain(
                "note",
                f"{out} was moved or copied from {before}: MLflow's addresses of its artifacts follow",
                WARNING,
            )


def sync(
    out: Path,
    *,
    uri: str | None = None,
    timeout: float = math.inf,
    sink: Sink | None = None,
    say: Callable[[int], None] | None = None,
) -> tuple[int, str | None]:
    """Deliver the pending rows of a study directory: (rows still pending, why). Continues while rows arrive.

    `uri` sends everything to another tracking server instead; `say` is called every ten seconds with the number of pending rows.
    Safe while the study runs: the process that holds the lock delivers. Raises ConfigError if `out` has no outbox.
    """
    if not (out / FILE).exists():
        raise ConfigError(
            f"{out} holds no {FILE}: nothing was tracked there. Give the OUT directory of a run."
        )
    settle(out)
    outbox = Outbox(out / FILE)
    try:
        target = uri or outbox.meta("uri") or None
        experiment = outbox.meta("experiment") or "temporal-merge"
        tracker = Tracker(out, outbox, uri=target, experiment=experiment, sink=sink, remember=False)
        tracker.start()
        pending = tracker.close(timeout, SYNC_PATIENCE, say)
        late = f"it took longer than {timeout:g} s; what is left can be delivered later"
        return pending, (tracker.last_error or late) if pending else None
    finally:
        outbox.close()


def file_with_study(
    out: Path, plan: str, names: Sequence[str], *, timeout: float = 60.0
) -> tuple[int, str | None]:
    """Attach small files of OUT (`names` relative to it, such as report/report.html) to the study's run of a plan.

    A file is sent again only if its bytes have changed; it replaces the one of its name. Returns (rows still pending, why) as
    `sync`, which delivers them later if the tracker is down. (0, None) if nothing was tracked.
    """
    if not (out / FILE).exists():
        return 0, None
    outbox, rows, now = Outbox(out / FILE), Rows(plan), time.time_ns() // 1_000_000
    try:
        for name in names:
            digest = hashlib.sha256((out / name).read_bytes()).hexdigest()
            outbox.extend([rows.artifact(STUDY, _filed_as(name), now, path=name, sha256=digest)])
    finally:
        outbox.close()
    return sync(out, timeout=timeout)


def _filed_as(name: str) -> str:
    """report.html for report/report.html, val-report.html for report-val/report.html: a run's files are in one directory."""
    folder, file = Path(name).parts[0], Path(name).name
    return f"{folder.removeprefix('report-')}-{file}" if folder.startswith("report-") else file


def destination_name(uri: str | None, experiment: str) -> str:
    """The name of a tracking store in the outbox. It contains no part of the address."""
    place = _LOCAL if uri is None else hashlib.sha256(uri.encode()).hexdigest()[:16]
    return f"{place}/{experiment}"


def _refuse_password(uri: str | None) -> None:
    try:
        if uri is not None:
            refuse_secret("tracking.uri", uri, CREDENTIALS)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _remember(outbox: Outbox, uri: str | None, experiment: str) -> None:
    name = destination_name(uri, experiment)
    for key, value in (("uri", uri or ""), ("experiment", experiment), ("destination", name)):
        if outbox.meta(key) != value:
            outbox.set_meta(key, value)


def ui_url(out: Path, *, port: int = 5000) -> str:
    """The address at which the UI of `ui_command` shows the study's runs, in the view for model training."""
    home = f"http://127.0.0.1:{port}{DOOR}"
    outbox = Outbox(out / FILE)
    try:
        uri, name = outbox.meta("uri") or None, outbox.meta("experiment")
    finally:
        outbox.close()
    if uri is None and (out / LOCAL_DB).exists():
        database = sqlite3.connect(f"{(out / LOCAL_DB).resolve().as_uri()}?mode=ro", uri=True)
        try:
            found = database.execute(
                "SELECT experiment_id FROM experiments WHERE name = ?", (name,)
            ).fetchone()
        except sqlite3.Error:
            found = None  # another process writes it: fall back to the list of experiments
        finally:
            database.close()
        if found is not None:
            return f"{home}?experiment={found[0]}"
    return home


def ui_command(out: Path, *, port: int = 5000) -> list[str]:
    """The command that shows a study in the MLflow UI, on 127.0.0.1 only.

    Raises ConfigError if the study is tracked on a server of its own (its address is the UI), or not at all.
    """
    if not (out / FILE).exists():
        raise ConfigError(
            f"{out} holds no {FILE}: nothing was tracked there. Give the OUT directory of a run."
        )
    outbox = Outbox(out / FILE)
    try:
        uri = outbox.meta("uri") or None
    finally:
        outbox.close()
    if uri is not None and urlsplit(uri).scheme in ("http", "https"):
        raise ConfigError(f"{out} is tracked on {redact(uri)}: open that address in a browser")
    if uri is None:
        make_local_store(out)
        settle(out)
    root = (out.resolve() / LOCAL_ARTIFACTS).as_uri()
    module = "pipeline.tracking.mlflow.ui"
    return [
        sys.executable,
        "-P",
        "-W",
        "ignore",
        "-m",
        module,
        uri or local_uri(out),
        root,
        "127.0.0.1",
        str(port),
    ]
