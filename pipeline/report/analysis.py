"""Statistics of a study: groups at the last t, the group to deploy, and which axis of a strategy mattered.

Invariant: pure functions over the frames of `frames.py`. Intervals are over seeds only; only groups that are equal in everything
else are compared; what the points do not determine is missing, never guessed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t as student

from pipeline.plan.draft import JOINT_TASK
from pipeline.report.frames import OF_POINT, UNTRAINED

METRICS = ("ka", "zs", "gm", "forgetting", "bwt", "zs_replayed", "zs_never_replayed")
OF_ONE = ("seed", "trajectory")
"""Columns of points in which the trajectories of a group differ."""
CONFIDENCE = 0.95
EQUAL = 1e-12
"""A standard deviation below this is that of equal scores."""
ALIKE = 1e-6
"""Scores closer than this are drawn as equal."""


def last(points: pd.DataFrame) -> pd.DataFrame:
    """One row per group (trajectories that differ in the seed alone) at the last t that all its seeds have reached.

    Columns: the description of the group, `t`, its `task`, `seeds`, and for every metric m: `m` the mean over seeds, `m_sd` the
    sample standard deviation and `m_ci` half the width of the 95 % interval of the mean (Student's t); both missing for a single
    seed, and `m_ci` where trained models of several seeds score alike: their spread is not 0, it is not known. What trains
    nothing has no spread.
    """
    if points.empty:
        return pd.DataFrame(columns=[*_described(points), "t", "task", "seeds", *_statistics()])
    reached = points.groupby(["group", "t"])["seed"].nunique()
    wanted = points.groupby("group")["seed"].nunique()
    whole = reached[reached.to_numpy() == wanted.loc[reached.index.get_level_values("group")].to_numpy()]
    ends = whole.reset_index().groupby("group")["t"].max()
    final = points[points["t"] == points["group"].map(ends)]
    rows = final.drop_duplicates("group").set_index("group", drop=False)
    rows = rows[[*_described(points), "t", "task"]].copy()
    groups = final.groupby("group")
    rows["seeds"] = groups.size()
    found: dict[str, pd.Series] = {}
    for metric in METRICS:
        of_metric = groups[metric].agg(["mean", "std", "count"]).reindex(rows.index)
        half = [
            math.nan if sd < EQUAL and mixture != UNTRAINED else half_width(sd, int(count))
            for sd, count, mixture in zip(of_metric["std"], of_metric["count"], rows["mixture"], strict=True)
        ]
        found |= {metric: of_metric["mean"], f"{metric}_sd": of_metric["std"]}
        found[f"{metric}_ci"] = pd.Series(half, index=rows.index)
    return pd.concat([rows, pd.DataFrame(found)], axis=1).reset_index(drop=True)


def _described(points: pd.DataFrame) -> list[str]:
    return [name for name in points.columns if name not in (*OF_POINT, *OF_ONE)]


def _statistics() -> list[str]:
    return [f"{metric}{suffix}" for metric in METRICS for suffix in ("", "_sd", "_ci")]


def pareto(rows: pd.DataFrame, up: str = "ka", across: str = "zs", cheap: bool = False) -> pd.Series:
    """Which rows are on the Pareto front of two columns: no other row is at least as good in both and better in one. Equal rows
    all are.

    More is better; with `cheap`, less of `across` is.
    """
    one = rows[up].to_numpy(float)
    other = rows[across].to_numpy(float) * (-1 if cheap else 1)
    as_good = (one[None, :] >= one[:, None]) & (other[None, :] >= other[:, None])
    better = (one[None, :] > one[:, None]) | (other[None, :] > other[:, None])
    known = ~(np.isnan(one) | np.isnan(other))
    return pd.Series(known & ~(as_good & better).any(axis=1), index=rows.index, dtype=bool)


def spread(rows: pd.DataFrame, metric: str = "gm") -> pd.DataFrame:
    """The spread of strategies with the technique fixed, beside the spread of techniques with the strategy fixed.

    `rows` have `slice` (equal in everything but strategy and technique), `strategy` and `choice` (the technique with its
    parameters). Two rows, `over` strategies and techniques: the mean `range` (largest minus smallest) and mean `sd` of the metric
    over the `lines` of a table per slice that have two cells or more, and the number of `cells` in these. Only slices with lines
    of both kinds count. Trajectories that merge nothing have no technique and do not count. Without such a line `range` and `sd`
    are missing. TIME (arXiv 2412.06712) claims that the first is much the larger.
    """
    merged = rows[rows["technique"] != "-"]
    cells = merged.groupby(["slice", "choice", "strategy"], sort=False)[metric].mean().dropna()
    found = {}
    for over, fixed in (("strategies", "choice"), ("techniques", "strategy")):
        lines = cells.groupby(level=["slice", fixed], sort=False).agg(["count", "min", "max", "std"])
        found[over] = lines[lines["count"] > 1]
    both = set.intersection(*(set(lines.index.get_level_values("slice")) for lines in found.values()))
    answer = []
    for over, lines in found.items():
        lines = lines[lines.index.isin(both, level="slice")]
        answer.append(
            {
                "over": over,
                "range": (lines["max"] - lines["min"]).mean(),
                "sd": lines["std"].mean(),
                "lines": len(lines),
                "cells": int(lines["count"].sum()),
            }
        )
    return pd.DataFrame(answer)


def coincident(points: pd.DataFrame, metrics: Sequence[str]) -> list[list[str]]:
    """Groups whose means over seeds are equal in these metrics at every t, so that their lines hide each other."""
    means = points.groupby(["group", "t"], sort=False)[list(metrics)].mean()
    means = (means / ALIKE).round().fillna(-1).astype("int64")
    found: dict[tuple[Any, ...], list[str]] = {}
    for group, rows in means.groupby(level="group", sort=False):
        key = (*rows.index.get_level_values("t"), *rows.to_numpy().ravel())
        found.setdefault(key, []).append(str(group))
    return [groups for groups in found.values() if len(groups) > 1]


def forgotten(scores: pd.DataFrame, points: pd.DataFrame) -> pd.DataFrame:
    """The forgetting of every trajectory and task: `group`, `trajectory`, `task`, `arrival`, `forgetting`.

    Forgetting of a task is its best score at any t >= 1 less that at the last t. `results.forgetting` is its mean over all tasks
    but the last. Tasks that bring parts of datasets have no score of their own.
    """
    learnt = scores[scores["arrival"].notna() & (scores["t"] > 0)]
    if learnt.empty:
        return pd.DataFrame(columns=["group", "trajectory", "task", "arrival", "forgetting"])
    per_task = (
        learnt.groupby(["group", "trajectory", "arrival", "t"], sort=False)["score"].mean().reset_index()
    )
    ends = per_task.groupby("trajectory")["t"].transform("max")
    final = per_task[per_task["t"] == ends].set_index(["group", "trajectory", "arrival"])["score"]
    best = per_task.groupby(["group", "trajectory", "arrival"], sort=False)["score"].max()
    lost = (best - final).rename("forgetting").reset_index()
    lost = lost[lost["arrival"] < lost["trajectory"].map(per_task.groupby("trajectory")["t"].max())].copy()
    names = points.drop_duplicates(["trajectory", "t"]).set_index(["trajectory", "t"])["task"]
    lost["task"] = [names.get((row.trajectory, int(row.arrival)), "?") for row in lost.itertuples()]
    return lost


@dataclass(frozen=True)
class Advice:
    """Which group to deploy, by the mean of a metric; `separated` is None if an interval or a runner-up is missing."""

    group: str
    runner_up: str | None
    separated: bool | None
    sentence: str


def recommend(rows: pd.DataFrame, metric: str = "gm") -> Advice | None:
    """The best row of `last`, and whether its interval and the runner-up's are apart. None without scores.

    The multitask reference sees all tasks at once, so it is never advised.
    """
    scored = rows[(rows["task"] != JOINT_TASK) & rows[metric].notna()]
    scored = scored.sort_values(metric, ascending=False, kind="stable")
    if scored.empty:
        return None
    best, label = scored.iloc[0], metric.upper()
    sentence = f"Deploy {best['group']}: {label} {best[metric]:.3f} at t={best['t']}"
    if len(scored) == 1:
        return Advice(best["group"], None, None, f"{sentence}, the only one that was scored.")
    second = scored.iloc[1]
    ci, gap = f"{metric}_ci", best[metric] - second[metric]
    sentence += f", {gap:.3f} above {second['group']}"
    apart = best[ci] + second[ci]
    if math.isnan(apart):
        few = min(best["seeds"], second["seeds"]) < 2
        why = "one seed each cannot" if few else "seeds with equal scores cannot"
        return Advice(best["group"], second["group"], None, f"{sentence}; {why} say how sure.")
    separated = bool(gap > apart)
    sure = (
        "their 95 % intervals are apart"
        if separated
        else "within their 95 % intervals, so hardly a difference"
    )
    return Advice(best["group"], second["group"], separated, f"{sentence}; {sure}.")


def half_width(sd: float, seeds: int) -> float:
    """Half of the 95 % interval of a mean over seeds (Student's t) with this sample standard deviation; NaN for one seed."""
    if seeds < 2:
        return math.nan
    return float(student.ppf((1 + CONFIDENCE) / 2, seeds - 1) * sd / math.sqrt(seeds))
