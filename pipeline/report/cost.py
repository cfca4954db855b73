"""What a study took: steps, compute, time, memory and bytes by kind of step, from plan, records and timeline.

Invariant: only what was measured is shown; what is missing (no timeline, a step without a cost) is missing, never zero.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from pipeline.plan.steps import Plan, total_gflops
from pipeline.store.artifact import Record

COLUMNS = (
    "kind", "steps", "steps_one_by_one", "gflops", "worker_seconds", "cpu_seconds", "peak_memory_bytes",
    "peak_gpu_memory_bytes", "bytes_written",
)  # fmt: skip


def costs(plan: Plan, records: Iterable[Record], timeline: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """One row per kind of step: train, merge, evaluate (`COLUMNS`).

    `records` are those of finished steps, `timeline` the lines of timeline.jsonl. Seconds are summed over the plan's steps
    (of a step tried twice, the last counts), memory is the most that one process had; what a study shares with another was
    measured there and is not in its timeline.
    """
    took = {line["fingerprint"]: line for line in timeline if line.get("fingerprint") in plan.steps}
    written = {
        record.fingerprint: sum(entry["bytes"] for entry in record.files.values()) for record in records
    }
    rows = []
    for kind, alone in plan.naive.items():
        steps = [step for step in plan.steps.values() if step.kind == kind]
        lines = [took[step.fingerprint] for step in steps if step.fingerprint in took]
        sizes = [written[step.fingerprint] for step in steps if step.fingerprint in written]
        gflops = total_gflops(step.gflops for step in steps)
        rows.append(
            {
                "kind": kind,
                "steps": len(steps),
                "steps_one_by_one": alone,
                "gflops": math.nan if gflops is None else gflops,
                "worker_seconds": _total(line["end"] - line["start"] for line in lines),
                "cpu_seconds": _total(line["cpu_seconds"] for line in lines),
                "peak_memory_bytes": _most(line.get("memory_bytes") for line in lines),
                "peak_gpu_memory_bytes": _most(line.get("gpu_memory_bytes") or None for line in lines),
                "bytes_written": _total(sizes),
            }
        )
    return pd.DataFrame(rows, columns=list(COLUMNS))


def elapsed(timeline: Iterable[Mapping[str, Any]]) -> float | None:
    """Seconds that the runs of a study took, from start to last step, without the time between them."""
    runs: list[tuple[float, float]] = []
    for line in timeline:
        if line.get("event") == "start":
            runs.append((line["time"], line["time"]))
        elif "end" in line and runs:
            began, last = runs[-1]
            runs[-1] = (began, max(last, line["end"]))
    return sum(last - began for began, last in runs) or None


def _total(values: Iterable[float]) -> float:
    found = list(values)
    return math.fsum(found) if found else math.nan


def _most(values: Iterable[float | None]) -> float:
    return max((value for value in values if value is not None), default=math.nan)
