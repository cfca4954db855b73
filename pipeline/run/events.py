"""What went otherwise than planned, run after run: retries, losses, waits, warnings, as one JSON line each in OUT/events.jsonl.

Invariant: lines are only ever added, each in one write that is forced to disk, so a crash costs at most the line under way; the log is
only information, nothing reads it to decide anything, and a line that cannot be written is left out.
"""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

FILE = "events.jsonl"
_TAIL_BYTES = 64 * 1024


class Events:
    """Appends to the log of `out`. `kind` is one of start, warning, retry, lost, waiting, tracker, versions, failed, end."""

    def __init__(self, out: Path) -> None:
        self._path = out / FILE

    def add(self, kind: str, text: str, **facts: Any) -> None:
        """Something that happened now; `facts` are for programs."""
        line = json.dumps({"time": time.time(), "kind": kind, "text": text, **facts}) + "\n"
        with contextlib.suppress(OSError):
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            try:
                os.write(handle, (b"" if _ends_whole(handle) else b"\n") + line.encode())
                os.fsync(handle)
            finally:
                os.close(handle)


def read_events(out: Path, last: int = 20) -> list[dict[str, Any]]:
    """The last events of a study directory, oldest first; none where there are none. A line that was cut is left out."""
    try:
        with (out / FILE).open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - _TAIL_BYTES))
            lines = stream.read().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            if isinstance(event, dict) and {"time", "kind", "text"} <= event.keys():
                found.append(event)
    return found[-last:]


def _ends_whole(handle: int) -> bool:
    size = os.fstat(handle).st_size
    return size == 0 or os.pread(handle, 1, size - 1) == b"\n"
