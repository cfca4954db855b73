"""A trace of the run: what ran where and when, as a file with one JSON line per finished step.

Invariant: the trace is information only. A line that cannot be written is left out, and no decision depends on it.
"""

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.plan.steps import Step

if TYPE_CHECKING:  # imports Ray, which reading a timeline does not need
    from cluster.pool import Usage

FILE = "timeline.jsonl"


class Timeline:
    """Appends to `OUT/timeline.jsonl`. Each run of a study begins with a line of `event` start, then ready."""

    def __init__(self, out: Path) -> None:
        self._path = out / FILE

    def event(self, name: str, **facts: object) -> None:
        """Record an event that is not a step, at the current time."""
        self._append({"event": name, "time": time.time(), **facts})

    def step(self, step: Step, usages: Sequence["Usage"], worker: str) -> float:
        """Record a finished step; returns the seconds that its workers took, from the first rank's start to the last one's end.

        CPU seconds are summed over ranks. Memory is the most that one rank had, in bytes: resident with mapped files, and on its
        GPU (0 without one).
        """
        start, end = min(usage.start for usage in usages), max(usage.end for usage in usages)
        self._append(
            {
                "fingerprint": step.fingerprint, "kind": step.kind, "label": step.label, "t": step.t,
                "start": start, "end": end,
                "cpu_seconds": round(sum(usage.cpu_seconds for usage in usages), 6),
                "memory_bytes": max(usage.memory for usage in usages),
                "gpu_memory_bytes": max(usage.gpu_memory for usage in usages),
                "worker": worker, "node": " ".join(dict.fromkeys(usage.node for usage in usages)),
            }
        )  # fmt: skip
        return float(end - start)

    def _append(self, line: Mapping[str, object]) -> None:
        with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")


def read_timeline(out: Path) -> list[dict[str, object]]:
    """The lines of a timeline, oldest first, without lines that a crash has cut. Raises OSError if there is no file."""
    lines = []
    for text in (out / FILE).read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    return lines
