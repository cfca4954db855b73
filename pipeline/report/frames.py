"""`results.json` as frames to group, filter and draw.

Invariant: a row is a point of results.json and nothing is computed here; what a point does not have is missing (NaN in
columns of numbers, None in text), and an answer without points still gives every column.
"""

import json
from collections.abc import Mapping
from typing import Any

import pandas as pd

from pipeline.results import split_of

OF_TRAJECTORY = {
    "trajectory": "object", "group": "object", "name": "object", "model": "object", "init": "object",
    "deploy": "object", "technique": "object", "params": "object", "ema_seed": "object", "budget": "object",
    "steps_per_task": "int64", "seed": "int64", "stream": "object", "tasks": "int64", "axes": "object", "split": "object",
}  # fmt: skip
OF_POINT = {
    "t": "int64", "task": "object", "ka": "float64", "zs": "float64", "gm": "float64", "forgetting": "float64",
    "bwt": "float64", "expert_own_score": "float64", "merge_seconds": "float64", "merged_norm": "float64",
    "cosine": "float64", "expert_sha256": "object", "merged_sha256": "object", "zs_replayed": "float64",
    "zs_never_replayed": "float64",
}  # fmt: skip
OF_SCORE = {
    "trajectory": "object", "group": "object", "seed": "int64", "t": "int64", "dataset": "object",
    "role": "object", "score": "float64", "split": "object", "zero_shot": "object",
}  # fmt: skip


def points(answer: Mapping[str, Any]) -> pd.DataFrame:
    """One row per trajectory and t: what the trajectory is (`OF_TRAJECTORY`) and what was found at t (`OF_POINT`).

    `technique` is "-" where nothing is merged; `params`, `stream` and `axes` are text; scores are fractions in [0, 1].
    """
    rows = [
        {**_described(trajectory), **{column: step.get(column) for column in OF_POINT}}
        for trajectory in answer["trajectories"]
        for step in trajectory["steps"]
    ]
    return _frame(rows, {**OF_TRAJECTORY, **OF_POINT})


def scores(answer: Mapping[str, Any]) -> pd.DataFrame:
    """One row per trajectory, t and dataset; `role` is adaptation or held_out, of a dataset that is both, adaptation.

    `zero_shot` is a held-out set's group (replayed, never_replayed), missing for others and in results older than groups.
    """
    adaptation = set(answer["adaptation"])
    groups = {name: group for group, names in answer.get("zero_shot_groups", {}).items() for name in names}
    rows = [
        {
            **{column: trajectory[column] for column in ("group", "seed")},
            "trajectory": trajectory["id"],
            "t": step["t"],
            "dataset": dataset,
            "role": "adaptation" if dataset in adaptation else "held_out",
            "score": score,
            "split": split_of(trajectory),
            "zero_shot": groups.get(dataset),
        }
        for trajectory in answer["trajectories"]
        for step in trajectory["steps"]
        for dataset, score in step["scores"].items()
    ]
    return _frame(rows, OF_SCORE)


def _frame(rows: list[dict[str, Any]], columns: Mapping[str, str]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(columns)).astype(dict(columns))


def _described(trajectory: Mapping[str, Any]) -> dict[str, Any]:
    steps = trajectory["budget"]["steps_per_task"]
    return {
        **{column: trajectory[column] for column in ("group", "name", "model", "init", "deploy", "seed")},
        "trajectory": trajectory["id"],
        "technique": trajectory["technique"] or "-",
        "params": _text(trajectory["params"]),
        "ema_seed": trajectory["ema_seed"],
        "budget": f"{steps} steps",
        "steps_per_task": steps,
        "stream": " ".join(trajectory["stream"]),
        "tasks": len(trajectory["stream"]),
        "axes": _text(trajectory["axes"]),
        "split": split_of(trajectory),
    }


def _text(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in values.items()
    )
