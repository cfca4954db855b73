"""Studies with invented scores, large enough to fill every figure of a report."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from merge_service.checkpoints import WEIGHTS_FILE
from pipeline.plan.steps import Plan
from pipeline.report.sources import Studied
from pipeline.results.over_time import results
from pipeline.store.artifact import Record
from tests.pipeline.plan_toys import facts, make_plan, study

MERGED = {
    "init": ["base", "ema", "all"],
    "deploy": ["all", "ema"],
    "technique": ["average", "ties", "task_arithmetic"],
}
FULL = {"strategies": ["zero_shot", "multitask", MERGED], "seed": [0, 1], "budget.multiplier": [1, 2]}
PAIRS = pd.DataFrame(
    {
        "part": "whole model",
        "one": ["a", "a", "b", "b"],
        "other": ["a", "b", "a", "b"],
        "cosine": [1, 0.2, 0.2, 1],
        "conflict": [0, 0.4, 0.4, 0],
    }
)


def invented(plan: Plan, **how: Any) -> Any:
    path = Path(__file__).parents[2] / "benchmarks" / "study_report.py"
    spec = importlib.util.spec_from_file_location("study_report", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))  # benchmarks import each other by plain names
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return results(plan, module.Invented(plan, **how))


def records(plan: Plan) -> dict[str, Record]:
    """Invented records of every base, expert and merge: training curves, seconds and sha256, without weights."""
    found = {}
    for place, step in enumerate((*plan.bases.values(), *plan.steps.values())):
        if step.kind != "evaluate":
            result = {"loss": [[n, 2 / n + step.t] for n in range(1, 101)]} if step.kind == "train" else {}
            files = {WEIGHTS_FILE: {"sha256": f"{place:064x}", "bytes": 10}}
            found[step.fingerprint] = Record(
                step.kind, step.fingerprint, "invented", {}, {}, {}, files, result, 1_790_000_000_000 + place * 60_000,
                2.0 + place / 10, {"torch": "2.0"}, Path("store") / step.kind / step.fingerprint[:8],
            )  # fmt: skip
    return found


def studied(out: Path, plan: Plan, answer: Any = None) -> Studied:
    """A run with invented scores and records."""
    return Studied(out, plan, invented(plan) if answer is None else answer, records(plan))


def toy(grid: dict[str, Any], tasks: int = 3) -> Plan:
    return make_plan(study([], tasks, grid=grid), facts(tasks))
