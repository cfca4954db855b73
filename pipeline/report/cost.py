"""The cost of a study by kind of step and by trajectory: steps, compute, time, memory and bytes, from plan, records and timeline.

Invariant: only measured values are shown; what was not measured (no timeline, a step without a cost) is missing, never zero.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from pipeline.plan.steps import Plan, Step, TrajectoryPlan, total_gflops
from pipeline.store.artifact import Record

COLUMNS = (
    "kind", "steps", "steps_one_by_one", "gflops", "worker_seconds", "cpu_seconds", "peak_memory_bytes",
    "peak_gpu_memory_bytes", "bytes_written",
)  # fmt: skip


def costs(plan: Plan, records: Iterable[Record], timeline: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """One row per kind of step: train, merge, evaluate (`COLUMNS`).

    `records` are those of finished steps, `timeline` the lines of timeline.jsonl. Seconds are summed over the plan's steps (the
    last try of each); memory is the most that one process had. A step that another study computed was measured there and is not
    in this timeline.
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


def own_costs(plan: Plan, records: Mapping[str, Record]) -> pd.DataFrame:
    """The cost of each trajectory if it were run alone: `trajectory`, `gflops` of training, `seconds` of training and merging.

    Missing if the cost of a sample was not measured, or a step is not done yet. Seconds come from the records, so they hold for
    the machine that computed the steps.
    """
    rows = []
    for trajectory in plan.trajectories:
        steps = [step for step in made_by(plan, trajectory).values() if step.kind != "evaluate"]
        done = [records.get(step.fingerprint) for step in steps]
        gflops = total_gflops(step.gflops for step in steps)
        whole = all(record is not None for record in done)
        seconds = math.fsum(record.seconds for record in done if record is not None) if whole else math.nan
        rows.append((trajectory.id, math.nan if gflops is None else gflops, seconds))
    return pd.DataFrame(rows, columns=["trajectory", "gflops", "seconds"])


def made_by(plan: Plan, trajectory: TrajectoryPlan) -> dict[str, Step]:
    """The steps that a trajectory needs for the models it serves, by fingerprint: experts and merges, and their inputs."""
    found: dict[str, Step] = {}
    ahead = [
        name for point in trajectory.points for name in (point.train, point.deployed, point.init) if name
    ]
    while ahead:
        fingerprint = ahead.pop()
        if fingerprint in found or fingerprint not in plan.steps:
            continue
        found[fingerprint] = plan.steps[fingerprint]
        ahead += found[fingerprint].inputs.values()
    return found


def elapsed(timeline: Iterable[Mapping[str, Any]]) -> float | None:
    """Seconds that the runs of a study took, from start to last step, without the time between runs."""
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
