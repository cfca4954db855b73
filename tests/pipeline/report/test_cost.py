"""The cost of a study, compared with numbers computed by hand."""

import math
from types import SimpleNamespace
from typing import Any

from pipeline.report.cost import costs, elapsed
from tests.pipeline.plan_toys import facts, make_plan, study

PLAN = make_plan(study(["offline_merging"], 2), facts(2))
TRAIN = [fp for fp, step in PLAN.steps.items() if step.kind == "train"]


def line(fingerprint: str, start: float, end: float, **more: Any) -> dict[str, Any]:
    return {
        "fingerprint": fingerprint,
        "kind": "train",
        "start": start,
        "end": end,
        "cpu_seconds": 1.5,
        **more,
    }


def test_costs_add_up_by_kind_and_take_the_largest_memory() -> None:
    lines = [line(TRAIN[0], 0, 9, memory_bytes=99), line(TRAIN[0], 10, 14, memory_bytes=5), line(TRAIN[1], 14, 17, memory_bytes=7), line("other", 0, 99)]  # fmt: skip
    records: list[Any] = [
        SimpleNamespace(fingerprint=fp, files={"a": {"bytes": 10}, "b": {"bytes": 1}}) for fp in TRAIN
    ]
    row = costs(PLAN, records, lines).set_index("kind").loc["train"]
    assert (row["steps"], row["worker_seconds"], row["cpu_seconds"]) == (2, 7, 3)
    assert (row["peak_memory_bytes"], row["bytes_written"]) == (7, 22)
    assert math.isnan(row["peak_gpu_memory_bytes"])
    assert row["gflops"] == sum(PLAN.steps[fp].gflops or 0 for fp in TRAIN)


def test_what_was_not_measured_is_missing() -> None:
    rows = costs(PLAN, [], []).set_index("kind")
    assert rows.loc["train", "steps"] == 2
    for column in ("worker_seconds", "cpu_seconds", "peak_memory_bytes", "bytes_written"):
        assert math.isnan(rows.loc["train", column])


def test_elapsed_time_leaves_out_the_time_between_runs() -> None:
    lines = [
        {"event": "start", "time": 0.0},
        line("a", 2, 5),
        {"event": "start", "time": 100.0},
        line("b", 103, 104),
    ]
    assert elapsed(lines) == 9
    assert elapsed([]) is None and elapsed([{"event": "start", "time": 0.0}]) is None
