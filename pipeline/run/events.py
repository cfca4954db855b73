"""The log of unplanned events: retries, losses, waits and warnings of all runs, as one JSON line each in OUT/events.jsonl.

Invariant: lines are only appended, each in one write that is synced to disk, so a crash loses at most the current line.
The log is information only: no decision depends on it, and a line that cannot be written is left out.
"""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import NotRequired, TypedDict, cast

FILE = "events.jsonl"
_TAIL_BYTES = 64 * 1024


class Event(TypedDict):
    """One line of the log; `time` is Unix time in seconds, `step` a fingerprint, `pid` the driver's."""

    time: float
    kind: str
    text: str
    step: NotRequired[str]
    pid: NotRequired[int]


class Events:
    """Appends to the log of `out`. `kind` is one of start, warning, retry, lost, waiting, delivery, tracker, versions, failed, end."""

    def __init__(self, out: Path) -> None:
        self._path = out / FILE

    def add(self, kind: str, text: str, **facts: object) -> None:
        """Record an event at the current time; `facts` are for programs."""
        line = json.dumps({"time": time.time(), "kind": kind, "text": text, **facts}) + "\n"
        with contextlib.suppress(OSError):
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            try:
                os.write(handle, (b"" if _ends_whole(handle) else b"\n") + line.encode())
                os.fsync(handle)
            finally:
                os.close(handle)


def read_events(out: Path, last: int = 20) -> list[Event]:
    """The last events of a study directory, oldest first, without lines that were cut; empty if there is no log."""
    try:
        with (out / FILE).open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - _TAIL_BYTES))
            lines = stream.read().splitlines()
    except OSError:
        return []
    found: list[Event] = []
    for line in lines:
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            if isinstance(event, dict) and {"time", "kind", "text"} <= event.keys():
                found.append(cast(Event, event))
    return found[-last:]


def _ends_whole(handle: int) -> bool:
    size = os.fstat(handle).st_size
    return size == 0 or os.pread(handle, 1, size - 1) == b"\n"
