"""Studies with invented scores, large enough to fill every figure of a report."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.plan.steps import Plan
from pipeline.results.over_time import results
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


def toy(grid: dict[str, Any], tasks: int = 3) -> Plan:
    return make_plan(study([], tasks, grid=grid), facts(tasks))
