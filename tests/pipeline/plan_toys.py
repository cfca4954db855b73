"""Small studies and facts that the tests of configuration, plan and results share."""

from typing import Any

from pipeline.config import Study, study_from
from pipeline.steps import DatasetFacts, Facts

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
    names = [*(f"d{t}" for t in range(1, tasks + 1)), "pool", "kept"]
    values: dict[str, Any] = {
        "base_sha256": "b" * 64,
        "datasets": {
            name: DatasetFacts({"train": f"{name}/train", "test": f"{name}/test"}, f"{name}/prompts")
            for name in names
        },
        "gflops_per_sample": {"all": 0.5, "image": 0.4},
        "memory_ratio": {"all": 1.0, "image": 0.8},
        "weights_bytes": 1_000_000,
    }
    return Facts(**{**values, **changes})
