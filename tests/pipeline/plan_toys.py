"""Small studies and facts for the tests of configuration, plan and results."""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from merge_service.checkpoints import WEIGHTS_FILE
from pipeline.plan.planner import make_plan as plan_of
from pipeline.plan.steps import DatasetFacts, Facts, ModelFacts, Plan
from pipeline.study.config import Study, study_from
from pipeline.study.sections import key_of
from pipeline.study.streams import datasets_of, make_stream

REPLAY = {"pretraining": 0.33, "update": 0.34, "buffer": 0.33}


def raw_study(strategies: list[Any], tasks: int = 3, **changes: Any) -> dict[str, Any]:
    """A study over tasks d1..dN, a pool and one held-out set, as plain values."""
    return {
        "name": "toy",
        "model": {"config": "toy"},
        "data": {"root": "somewhere", "pretraining": ["pool"], "held_out": ["kept"]},
        "stream": {"tasks": [f"d{t}" for t in range(1, tasks + 1)]},
        "recipe": {"batch_size": 64, "precision": "fp32", "mixture": REPLAY},
        "budget": {"steps_per_task": 100},
        "grid": {"strategies": strategies},
        **changes,
    }


def study(strategies: list[Any], tasks: int = 3, **changes: Any) -> Study:
    return study_from(raw_study(strategies, tasks, **changes)).resolved()


def facts(tasks: int = 6, **changes: Any) -> Facts:
    """Facts of the toy data, and of any model with its changes; `plan` adds the streams of a study."""
    names = [*(f"d{t}" for t in range(1, tasks + 1)), "pool", "kept"]
    values: dict[str, Any] = {
        "weights": "b" * 64,
        "gflops_per_sample": {"all": 0.5, "image": 0.4},
        "memory_ratio": {"all": 1.0, "image": 0.8},
        "weights_bytes": 1_000_000,
    }
    datasets = {
        name: DatasetFacts({"train": f"{name}/train", "test": f"{name}/test"}, f"{name}/prompts")
        for name in names
    }
    model = ModelFacts(**{**values, **changes})
    return Facts(datasets, defaultdict(lambda: model), {})


def make_plan(study: Study, known: Facts, classes: int = 4) -> Plan:
    """The plan of a study over toy data, with so many classes in each dataset."""
    streams = {}
    for section in study.streams:
        filled = study.filled(section)
        streams[key_of(section)] = make_stream(
            filled, {name: [f"{name}-{i}" for i in range(classes)] for name in datasets_of(filled)}
        )
    return plan_of(study, replace(known, streams=streams))


def base_of(plan: Plan) -> str:
    """The fingerprint of a plan's only base."""
    (base,) = plan.bases
    return base


def workspace_of(asked: Study, plan: Plan) -> Any:
    """A workspace that knows one record for everything: as much of one as making jobs takes."""
    record = SimpleNamespace(path=Path("somewhere"), sha256=lambda name: {WEIGHTS_FILE: "ab"}[name])
    return SimpleNamespace(
        plan=plan, study=asked, scratch=Path("s"), limits=Path("l"), known=lambda _: record, weights=Path
    )
