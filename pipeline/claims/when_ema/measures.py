"""Measures of the kept numbers, in the terms of the study: endpoints, choices on `val`, gains, drift, best weights, slopes.

Every definition is that of configs/studies/when_ema/README.md.

Invariant: a choice uses `val` alone and a score `test` alone; every result has a row per replicate, computed from that replicate
only.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from merge_service.errors import UserError
from pipeline.claims.when_ema.numbers import KEYS, Numbers

ARMS = {
    "zero-shot": ("base", "base"),
    "fine-tuning": ("latest", "latest"),
    "latest → ema": ("latest", "ema"),
    "ema → latest": ("ema", "latest"),
    "Best-in-TIME": ("ema", "ema"),
}
ZERO, FT, LE, EL, EE = ARMS
UNIT = [*KEYS]
SCORES = ("ka", "zs", "zs_replayed", "zs_never_replayed", "gm")
STREAM, END = "gm", "gm_end"
"""The first endpoint, and the second one."""


def whole(numbers: Numbers, names: Sequence[str]) -> list[int]:
    """The replicates that have the pieces of all these names."""
    made = numbers.made[numbers.made["piece"].isin(names)]
    count = made.groupby("replicate")["piece"].nunique()
    return sorted(int(replicate) for replicate in count.index[count == len(set(names))])


def core(numbers: Numbers, names: Sequence[str]) -> Numbers:
    """The pieces of these names, for the replicates that have all of them. Raises UserError if there is no such replicate."""
    if not (replicates := whole(numbers, names)):
        raise UserError(
            f"no replicate has all of {', '.join(names)} yet, so nothing can be judged; run the rest"
        )
    return numbers.of(*names).of_replicates(replicates)


def endpoints(numbers: Numbers) -> pd.DataFrame:
    """A row per piece, replicate and trajectory: `UNIT`, arm, weight, lr, `val` (V), test means over t >= 1 by their names (gm is S), and `gm_end`.

    The weight of fine-tuning is 1.
    """
    names = {cell: arm for arm, cell in ARMS.items()}
    rows = numbers.points[numbers.points["t"] >= 1].copy()
    rows["arm"] = [names[cell] for cell in zip(rows["init"], rows["deploy"], strict=True)]
    rows["weight"] = rows["weight"].where(rows["arm"] != FT, 1.0)
    by = [*UNIT, "arm", "weight", "lr"]
    grouped = rows.sort_values("t").groupby(by, dropna=False, sort=False)
    means = grouped[["gm_val", *(f"{name}_test" for name in SCORES)]].mean()
    means[END] = grouped["gm_test"].last()
    return means.rename(columns={"gm_val": "val", **{f"{name}_test": name for name in SCORES}}).reset_index()


def chosen(ends: pd.DataFrame, by: Sequence[str] = ()) -> pd.DataFrame:
    """The trajectory with the highest V, per piece, replicate and arm (and per `by`, such as lr); of equal ones the lower rate,
    the larger weight.
    """
    rows = ends.sort_values(["val", "lr", "weight"], ascending=[False, True, False], kind="stable")
    return rows.drop_duplicates([*UNIT, "arm", *by]).reset_index(drop=True)


def gains(
    picks: pd.DataFrame, arm: str = EE, over: str = FT, score: str = STREAM, by: Sequence[str] = ()
) -> pd.DataFrame:
    """`UNIT`, `by` and `gain`: the score of one arm's choice less that of another's."""
    keys = [*UNIT, *by]
    one, other = (picks[picks["arm"] == name].set_index(keys)[score] for name in (arm, over))
    return (one - other).dropna().rename("gain").reset_index()


def drifts(numbers: Numbers) -> pd.DataFrame:
    """`UNIT`, lr and `drift`: mean length of the task vectors of fine-tuning, each over the length of the weights where it began."""
    rows = numbers.experts[numbers.experts["init"] == "latest"]
    means = rows.groupby([*UNIT, "lr"], sort=False)["relative_drift"].mean()
    return means.rename("drift").reset_index()


def best_weights(ends: pd.DataFrame) -> pd.DataFrame:
    """`UNIT`, lr and `best`: the weight of Best-in-TIME with the highest V at that rate, fine-tuning being weight 1."""
    rows = ends[ends["arm"].isin([EE, FT])]
    rows = rows.sort_values(["val", "weight"], ascending=[False, False], kind="stable")
    rows = rows.drop_duplicates([*UNIT, "lr"])
    return rows[[*UNIT, "lr", "weight"]].rename(columns={"weight": "best"}).reset_index(drop=True)


def by_drift(rows: pd.DataFrame, value: str) -> pd.Series:
    """Per replicate the slope of `value` over log10 drift within each share, averaged over shares: the effect of a tenfold drift."""
    return _slopes(rows.assign(x=np.log10(rows["drift"])), value, within="share")


def by_share(rows: pd.DataFrame, value: str, within: str | None = None) -> pd.Series:
    """Per replicate the slope of `value` over the share of replay times the range of shares, averaged over `within` (such as lr)."""
    span = rows["share"].max() - rows["share"].min()
    return _slopes(rows.assign(x=rows["share"]), value, within) * span


def of_share(rows: pd.DataFrame, share: float, value: str = "gain") -> pd.Series:
    """One number per replicate at one share."""
    found: pd.Series = rows[np.isclose(rows["share"], share)].set_index("replicate")[value].sort_index()
    return found


def bends(numbers: Numbers) -> pd.DataFrame:
    """`UNIT`, arm, weight, lr, t and `bend`: a deployed average's test GM less the same average of the GMs of the two models in
    it.

    Above 0 the average is better than the line between its parts. At t = 1 the running model is the base.
    """
    keys = [*UNIT, "lr", "t"]
    rows = numbers.points.set_index(keys)
    found = []
    for arm, experts in ((LE, "latest"), (EE, "ema")):
        mine = rows[(rows["init"] == ARMS[arm][0]) & (rows["deploy"] == "ema")]
        new = rows[(rows["init"] == experts) & (rows["deploy"] == "latest")]
        for weight, one in mine.groupby("weight"):
            theirs = new if arm == LE else new[new["weight"] == weight]
            if theirs.empty:
                continue
            now = one["gm_test"]
            before = now.rename("before").reset_index()
            before["t"] += 1
            parts = pd.concat(
                [now.rename("now"), theirs["gm_test"].rename("new"), before.set_index(keys)["before"]], axis=1
            ).dropna()
            bend = parts["now"] - weight * parts["new"] - (1 - weight) * parts["before"]
            found.append(bend.rename("bend").reset_index().assign(arm=arm, weight=weight))
    return pd.concat(found, ignore_index=True)


def curvatures(numbers: Numbers) -> pd.DataFrame:
    """`UNIT`, lr and means over the experts of fine-tuning: `forgotten` (rise of the old loss along a task vector), `spared` (how
    far the old loss at half the way lies below the mean of both ends), `learned` and `early` (the same for the fall of the new
    loss).
    """
    rows = numbers.experts[numbers.experts["init"] == "latest"]
    halves = {
        name: (rows[f"{name}_start"] + rows[f"{name}_end"]) / 2 - rows[f"{name}_middle"]
        for name in ("old", "new")
    }
    rows = rows.assign(
        forgotten=rows["old_end"] - rows["old_start"], spared=halves["old"],
        learned=rows["new_start"] - rows["new_end"], early=halves["new"],
    )  # fmt: skip
    names = ["forgotten", "spared", "learned", "early", "distance", "cosine", "grad_last"]
    return rows.groupby([*UNIT, "lr"], sort=False)[names].mean().reset_index()


def with_drift(rows: pd.DataFrame, numbers: Numbers) -> pd.DataFrame:
    """Rows that have one rate each, with the drift of fine-tuning at that rate."""
    return rows.merge(drifts(numbers), on=[*UNIT, "lr"], how="inner", validate="many_to_one")


def _slopes(rows: pd.DataFrame, value: str, within: str | None) -> pd.Series:
    answer: dict[Any, float] = {}
    for replicate, mine in rows.groupby("replicate"):
        parts = [part for _, part in mine.groupby(within)] if within else [mine]
        slopes = [_slope(part["x"], part[value]) for part in parts if part["x"].nunique() > 1]
        if slopes:
            answer[replicate] = float(np.mean(slopes))
    return pd.Series(answer, dtype=float).sort_index()


def _slope(x: pd.Series, y: pd.Series) -> float:
    centred = x - x.mean()
    return float((centred * y).sum() / (centred**2).sum())
