"""Frames of a report: a row per point and per score, with nothing computed and nothing lost."""

from typing import Any

import pandas as pd

from pipeline.report.frames import OF_POINT, OF_SCORE, OF_TRAJECTORY, mixture_text, points, scores


def step(t: int, **found: Any) -> dict[str, Any]:
    return {**dict.fromkeys(OF_POINT), "t": t, "task": "base" if t == 0 else "a", "scores": {}, **found}


def answer(*steps: dict[str, Any], **changed: Any) -> dict[str, Any]:
    trajectory = {
        "id": "x/0", "group": "x", "name": "x", "init": "base", "deploy": "merge", "technique": "ties",
        "params": {"density": 0.2}, "ema_seed": None, "budget": {"steps_per_task": 100, "multiplier": 1.0},
        "seed": 3, "stream": ["a", "b"], "model": "tiny", "axes": {"lr": "low"}, "steps": list(steps), **changed,
    }  # fmt: skip
    return {"adaptation": ["a"], "held_out": ["z"], "trajectories": [trajectory]}


def test_points_row_says_trajectory_and_point() -> None:
    frame = points(answer(step(0, ka=0.25, zs=0.5), step(1, ka=0.5, forgetting=0.125)))
    assert list(frame.columns) == [*OF_TRAJECTORY, *OF_POINT, "technique.density"]
    assert frame["t"].tolist() == [0, 1]
    assert frame["ka"].tolist() == [0.25, 0.5]
    first = frame.iloc[0]
    assert (first["params"], first["axes"], first["stream"]) == ("density=0.2", "lr=low", "a b")
    assert (first["budget"], first["steps_per_task"], first["tasks"], first["seed"]) == (
        "100 steps", 100, 2, 3,
    )  # fmt: skip


def test_points_missing_numbers_are_nan_and_no_technique_is_a_dash() -> None:
    frame = points(answer(step(0, ka=0.25), technique=None, params={}))
    assert frame["forgetting"].isna().all() and frame["forgetting"].dtype == "float64"
    assert (frame["technique"][0], frame["params"][0]) == ("-", "")


def test_frames_of_a_study_without_points_keep_their_columns() -> None:
    assert list(points(answer()).columns) == [*OF_TRAJECTORY, *OF_POINT, "technique.density"]
    assert list(scores(answer()).columns) == list(OF_SCORE)


def test_scores_row_says_dataset_and_role() -> None:
    frame = scores(answer(step(1, scores={"a": 0.5, "z": 0.75})))
    rows = frame[["trajectory", "group", "seed", "t", "dataset", "role", "score"]].to_numpy().tolist()
    assert rows == [["x/0", "x", 3, 1, "a", "adaptation", 0.5], ["x/0", "x", 3, 1, "z", "held_out", 0.75]]


SETTINGS = {
    "recipe.lr": 0.001,
    "recipe.mixture.pretraining": 0.3,
    "recipe.mixture.update": 0.4,
    "recipe.mixture.buffer": 0.3,
}


def test_every_setting_is_a_column_and_the_mixture_a_readable_one() -> None:
    frame = points(answer(step(0), settings={**SETTINGS, "recipe.betas": [0.9, 0.999]}))
    row = frame.iloc[0]
    assert (row["recipe.lr"], row["recipe.betas"], row["mixture"]) == (
        0.001,
        "[0.9, 0.999]",
        "replay 0.3/0.4/0.3",
    )


def test_mixture_says_when_nothing_is_replayed_trained_or_known() -> None:
    alone = {
        **SETTINGS,
        "recipe.mixture.pretraining": 0,
        "recipe.mixture.update": 1,
        "recipe.mixture.buffer": 0,
    }
    assert [mixture_text(one) for one in (alone, {"model.config": "x"}, {})] == ["no replay", "-", "unknown"]


def test_score_says_what_it_is_and_when_its_dataset_arrives() -> None:
    told = answer(step(1, scores={"a": 0.5, "z": 0.75}), arrivals={"a": 1}) | {"retrieval": ["z"]}
    frame = scores(told).set_index("dataset")
    assert frame["measure"].to_dict() == {"a": "accuracy", "z": "recall@5"}
    assert frame.loc["a", "arrival"] == 1 and pd.isna(frame.loc["z", "arrival"])
