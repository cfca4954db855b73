"""`results.json` as frames to group, filter and draw.

Invariant: a row is a point of results.json and nothing is computed here. What a point does not have is missing (NaN in columns of
numbers, None in text), and results without points still give every column. Settings (`recipe.lr`, `model.pretrained`, ...) have a
column each, after the others.
"""

import json
from collections.abc import Mapping
from typing import Any

import pandas as pd

from pipeline.results.over_time import split_of

ACCURACY, RECALL = "accuracy", "recall@5"

OF_TRAJECTORY = {
    "trajectory": "object", "group": "object", "name": "object", "model": "object", "init": "object",
    "deploy": "object", "technique": "object", "params": "object", "ema_seed": "object", "budget": "object",
    "steps_per_task": "int64", "seed": "int64", "stream": "object", "tasks": "int64", "axes": "object", "split": "object",
    "study": "object", "mixture": "object", "parity": "object", "base": "object",
}  # fmt: skip
OF_POINT = {
    "t": "int64", "task": "object", "ka": "float64", "zs": "float64", "gm": "float64", "forgetting": "float64",
    "bwt": "float64", "expert_own_score": "float64", "merge_seconds": "float64", "merged_norm": "float64",
    "cosine": "float64", "expert_sha256": "object", "merged_sha256": "object", "zs_replayed": "float64",
    "zs_never_replayed": "float64",
}  # fmt: skip
OF_SCORE = {
    "trajectory": "object", "group": "object", "seed": "int64", "t": "int64", "dataset": "object",
    "role": "object", "score": "float64", "split": "object", "zero_shot": "object", "measure": "object", "arrival": "float64",
}  # fmt: skip
UNTRAINED, NO_REPLAY, UNKNOWN = "-", "no replay", "unknown"
"""Values of `mixture`: nothing is trained, a batch holds the new task only, and results older than settings."""


def points(answer: Mapping[str, Any]) -> pd.DataFrame:
    """One row per trajectory and t: the trajectory (`OF_TRAJECTORY`) and the results at t (`OF_POINT`).

    `technique` is "-" if nothing is merged; `params`, `stream`, `mixture` and `axes` are text; scores are fractions in [0, 1].
    The last columns are the settings and the technique's parameters, by dotted key, of every trajectory that has them.
    """
    trajectories = answer["trajectories"]
    varied = [settings_of(trajectory) for trajectory in trajectories]
    keys = dict.fromkeys(key for settings in varied for key in settings)
    rows = [
        {
            **_described(answer, trajectory),
            **{column: step.get(column) for column in OF_POINT},
            **{key: settings.get(key) for key in keys},
        }
        for trajectory, settings in zip(trajectories, varied, strict=True)
        for step in trajectory["steps"]
    ]
    frame = pd.DataFrame(rows, columns=[*OF_TRAJECTORY, *OF_POINT, *keys])
    return frame.astype({**OF_TRAJECTORY, **OF_POINT})


def scores(answer: Mapping[str, Any]) -> pd.DataFrame:
    """One row per trajectory, t and dataset; `role` is adaptation or held_out, and adaptation for a dataset that is both.

    `zero_shot` is a held-out set's group (replayed, never_replayed), missing for others and in results older than groups.
    `measure` is recall@5 for retrieval sets, else accuracy; `arrival` is the t whose task brings the whole dataset, missing if
    none does.
    """
    adaptation, retrieval = set(answer["adaptation"]), set(answer.get("retrieval", ()))
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
            "measure": RECALL if dataset in retrieval else ACCURACY,
            "arrival": trajectory.get("arrivals", {}).get(dataset),
        }
        for trajectory in answer["trajectories"]
        for step in trajectory["steps"]
        for dataset, score in step["scores"].items()
    ]
    return _frame(rows, OF_SCORE)


def _frame(rows: list[dict[str, Any]], columns: Mapping[str, str]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(columns)).astype(dict(columns))


def settings_of(trajectory: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a trajectory of results.json as cells by dotted key, `technique.<parameter>` included; lists are text."""
    params = {f"technique.{name}": value for name, value in trajectory["params"].items()}
    return {key: _listed(value) for key, value in {**trajectory.get("settings", {}), **params}.items()}


def mixture_text(settings: Mapping[str, Any]) -> str:
    """Shares of a batch from the pretraining pool, the new task and earlier tasks: `replay 0.33/0.34/0.33`, or `no replay`."""
    shares = [settings.get(f"recipe.mixture.{part}") for part in ("pretraining", "update", "buffer")]
    if not settings:
        return UNKNOWN
    if None in shares:
        return UNTRAINED
    return NO_REPLAY if shares[1] == 1 else "replay " + "/".join(f"{share:g}" for share in shares)


def _described(answer: Mapping[str, Any], trajectory: Mapping[str, Any]) -> dict[str, Any]:
    steps, settings = trajectory["budget"]["steps_per_task"], trajectory.get("settings", {})
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
        "study": answer.get("study", ""),
        "mixture": mixture_text(settings),
        "parity": settings.get("strategy.parity"),
        "base": trajectory.get("base"),
    }


def _listed(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value


def _text(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in values.items()
    )
