"""What ran where and when, as a file to draw: one JSON line per finished step.

Invariant: it is only information. A line that cannot be written is left out, and nothing ever reads it to decide anything.
"""

import contextlib
import json
import time
from pathlib import Path
from typing import Any

FILE = "timeline.jsonl"


class Timeline:
    """Appends to `OUT/timeline.jsonl`. Each run of a study begins with a line of `event` start, then ready."""

    def __init__(self, out: Path) -> None:
        self._path = out / FILE

    def event(self, name: str, **facts: Any) -> None:
        """Something that is no step, now."""
        self._append({"event": name, "time": time.time(), **facts})

    def step(self, step: Any, usages: Any, worker: str) -> None:
        """A finished step: CPU seconds summed over its ranks, from the first rank's start to the last one's end; memory is the most that one
        rank had, in bytes: resident with mapped files, and on its GPU (0 without one).
        """
        self._append(
            {
                "fingerprint": step.fingerprint, "kind": step.kind, "label": step.label, "t": step.t,
                "start": min(usage.start for usage in usages), "end": max(usage.end for usage in usages),
                "cpu_seconds": round(sum(usage.cpu_seconds for usage in usages), 6),
                "memory_bytes": max(usage.memory for usage in usages),
                "gpu_memory_bytes": max(usage.gpu_memory for usage in usages),
                "worker": worker, "node": " ".join(dict.fromkeys(usage.node for usage in usages)),
            }
        )  # fmt: skip

    def _append(self, line: dict[str, Any]) -> None:
        with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")


def read_timeline(out: Path) -> list[dict[str, Any]]:
    """The lines of a timeline, oldest first; one that was cut by a crash is left out. Raises OSError if there is none."""
    lines = []
    for text in (out / FILE).read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    return lines
