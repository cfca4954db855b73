"""What a study says: how groups stand at the end, which of them to deploy, and which axis of a strategy mattered.

Invariant: pure functions over the frames of `frames.py`; seeds are the only repetition an interval speaks of, and what
cannot be said of the points that are there is missing, never guessed.
"""

import math
from dataclasses import dataclass

import pandas as pd
from scipy.stats import t as student

from pipeline.expand import JOINT_TASK

METRICS = ("ka", "zs", "gm", "forgetting", "bwt", "zs_replayed", "zs_never_replayed")
DESCRIBED = (
    "group", "name", "model", "init", "deploy", "technique", "params", "budget", "steps_per_task", "stream", "tasks",
    "axes", "split",
)  # fmt: skip
SLICE = ("model", "budget", "stream", "axes")
"""What two trajectories must share before their strategies are compared."""
CONFIDENCE = 0.95


def last(points: pd.DataFrame) -> pd.DataFrame:
    """One row per group (trajectories that differ in the seed alone) at the last t that all its seeds have reached.

    `DESCRIBED`, `t`, its `task`, `seeds`, and for every metric m: `m` the mean over seeds, `m_sd` the sample standard deviation and
    `m_ci` half the width of the 95 % interval of the mean (Student's t); both missing for a single seed.
    """
    rows = []
    for _, members in points.groupby("group", sort=False):
        reached = members.groupby("seed")["t"].agg(set)
        common = set.intersection(*reached)
        if not common:
            continue
        final = members[members["t"] == max(common)]
        row = {**final.iloc[0][list(DESCRIBED)].to_dict(), "t": max(common), "task": final.iloc[0]["task"]}
        row["seeds"] = len(final)
        for metric in METRICS:
            values = final[metric].dropna()
            sd = values.std(ddof=1) if len(values) > 1 else math.nan
            row |= {metric: values.mean(), f"{metric}_sd": sd, f"{metric}_ci": half_width(sd, len(values))}
        rows.append(row)
    statistics = [f"{metric}{suffix}" for metric in METRICS for suffix in ("", "_sd", "_ci")]
    return pd.DataFrame(rows, columns=[*DESCRIBED, "t", "task", "seeds", *statistics])


def pareto(rows: pd.DataFrame) -> pd.Series:
    """Which rows no other row beats in KA and ZS at once (at least as good in both, better in one); equal rows all stand."""
    standing = []
    for row in rows.itertuples():
        as_good = rows[(rows["ka"] >= row.ka) & (rows["zs"] >= row.zs)]
        better = ((as_good["ka"] > row.ka) | (as_good["zs"] > row.zs)).any()
        standing.append(not better and not math.isnan(row.ka) and not math.isnan(row.zs))
    return pd.Series(standing, index=rows.index, dtype=bool)


def table(rows: pd.DataFrame, metric: str = "gm") -> pd.DataFrame:
    """Technique x (init, deploy) of the mean over the rows of `last`; a combination that was not tried is missing."""
    return rows.pivot_table(metric, index="technique", columns=["init", "deploy"], aggfunc="mean", sort=False)


def spread(rows: pd.DataFrame, metric: str = "gm") -> pd.DataFrame:
    """How far strategies lie apart with the technique fixed, beside how far techniques lie apart with the strategy fixed.

    Two rows, `over` strategies and techniques: the mean `range` (largest minus smallest) and mean `sd` of the metric over
    the `lines` of a table per slice (`SLICE`) that have two cells or more, and how many `cells` those hold. Trajectories
    that merge nothing have no technique and do not count. With no such line `range` and `sd` are missing.
    TIME (arXiv 2412.06712) claims that the first is much the larger.
    """
    merged = rows[rows["technique"] != "-"]
    cells = merged.groupby([*SLICE, "technique", "init", "deploy"], sort=False)[metric].mean().dropna()
    answer = []
    for over, fixed in (("strategies", ["technique"]), ("techniques", ["init", "deploy"])):
        lines = cells.groupby(level=[*SLICE, *fixed], sort=False).agg(["count", "min", "max", "std"])
        lines = lines[lines["count"] > 1]
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


@dataclass(frozen=True)
class Advice:
    """Which group to deploy, by the mean of a metric; `separated` is None where an interval or a runner-up is missing."""

    group: str
    runner_up: str | None
    separated: bool | None
    sentence: str


def recommend(rows: pd.DataFrame, metric: str = "gm") -> Advice | None:
    """The best row of `last` and how sure that is: whether its interval and the runner-up's are apart. None without scores.

    The multitask reference sees all tasks at once, so it is never what can be deployed over time.
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
        return Advice(best["group"], second["group"], None, f"{sentence}; one seed each cannot say how sure.")
    separated = bool(gap > apart)
    sure = (
        "their 95 % intervals are apart"
        if separated
        else "within their 95 % intervals, so hardly a difference"
    )
    return Advice(best["group"], second["group"], separated, f"{sentence}; {sure}.")


def half_width(sd: float, seeds: int) -> float:
    """Half of the 95 % interval of a mean over seeds (Student's t) with that sample standard deviation; NaN for one seed."""
    if seeds < 2:
        return math.nan
    return float(student.ppf((1 + CONFIDENCE) / 2, seeds - 1) * sd / math.sqrt(seeds))
