"""The parts of claims: the studies by name, strategies as selections of rows, and differences between them.

Invariant: every function gives a number per replicate, or one constant for all, and depends on no claim.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from pipeline.claims.judge import Part, shares
from pipeline.claims.results import Findings

CELLS, OFFLINE, NO_REPLAY, BUDGETS, MULTITASK, SIZES, HORIZONS, DATASETS, RATES = STUDIES = (
    "cells", "offline", "no_replay", "budgets", "multitask", "sizes", "horizons", "datasets", "learning_rates",
)  # fmt: skip
OFFLINE_CELL = {"init": "base", "deploy": "all"}
OFFLINE_AVERAGE = {**OFFLINE_CELL, "technique": "average"}
BASELINE = {"init": "latest", "deploy": "latest"}
BEST_IN_TIME = {"init": "ema", "deploy": "ema", "technique": "average"}
ZERO_SHOT = {"init": "base", "deploy": "base"}
AVERAGED = {"technique": ["average", "-"]}
GROUPS = (
    ("latest/latest", "latest/ema", "ema/latest", "ema/ema"),
    ("latest/all", "ema/all"),
    ("base/all", "base/ema"),
)
"""Groups of similar strategies (init/deploy): those that continue from what they serve, those that serve the average of a chain,
those that start every expert at the base. C8 compares the order within them.
"""
APART = {
    "ka": "KA", "zs": "ZS", "zs_replayed": "ZS on sets of which the replay pool holds the training side",
    "zs_never_replayed": "ZS on sets of which nothing is ever replayed",
}  # fmt: skip


def ends(found: Findings) -> tuple[float, float]:
    """The least and the largest budget multiplier."""
    multipliers = found.final(BUDGETS)["multiplier"]
    return float(multipliers.min()), float(multipliers.max())


def merged_cells(found: Findings, offline: bool = True) -> pd.DataFrame:
    """The cells with a technique, with `cell` = init/deploy; without `init: base` unless `offline`."""
    rows = found.final(CELLS)
    rows = rows[(rows["technique"] != "-") & (offline | (rows["init"] != "base"))]
    return rows.assign(cell=rows["init"] + "/" + rows["deploy"])


def explained_variance(found: Findings, offline: bool = True) -> pd.DataFrame:
    """Per replicate the shares of the variance of GM (`judge.shares`): of the cells (init x deploy) and the technique, and within
    the cells that deploy a merge (all, ema) those of init, deploy and the technique's main effects. `offline` as in `merged_cells`.
    """
    answer = {}
    for replicate, lines in merged_cells(found, offline).groupby("replicate"):
        part = lines[lines["deploy"].isin(["all", "ema"])]
        answer[replicate] = {
            **shares(lines, "gm", "cell", "technique"),
            "init_alone": shares(part.assign(rest=part["deploy"] + part["technique"]), "gm", "init", "rest")[
                "init"
            ],
            "deploy_alone": shares(
                part.assign(rest=part["init"] + part["technique"]), "gm", "deploy", "rest"
            )["deploy"],
            "technique_alone": shares(part, "gm", "cell", "technique")["technique"],
        }
    return pd.DataFrame(answer).T


def difference(
    found: Findings, study: str, one: dict[str, Any], other: dict[str, Any], metric: str = "gm", **more: Any
) -> pd.Series:
    """One strategy less another, per replicate."""
    return found.metric(study, metric, **one, **more) - found.metric(study, metric, **other, **more)


def across(one: pd.Series, other: pd.Series) -> pd.Series:
    """A number of every replicate less one that is the same for all of them (the base's)."""
    return one - float(other.iloc[0])


def apart(
    says: str, values: Any, metrics: tuple[str, ...] = tuple(APART), prefix: str = ""
) -> Iterator[Part]:
    """A comparison in KA, in ZS, and in each of the two groups of held-out sets; groups that were not scored are left out."""
    for metric in metrics:
        found = values(metric)
        if not found.isna().any():
            yield Part(prefix + metric, f"{says} {APART[metric]}", found, beside=True)


def tuned_only(found: Findings, where: dict[str, Any]) -> str:
    """The parameters of an offline technique's trajectory without a schedule."""
    rows = found.final(OFFLINE, **{**where, "replay": False})
    return str(next(params for params in rows["params"] if "schedule" not in params))


def step_of(groups: Sequence[Sequence[str]]) -> float:
    """The change of Kendall's tau when one pair changes its order."""
    return 2 / sum(len(group) * (len(group) - 1) // 2 for group in groups)


def of_groups(strategies: pd.Index, groups: list[list[str]]) -> float:
    """Mean rank correlation of two rankings that agree on the order of the groups and on nothing else."""
    place = {name: number for number, group in enumerate(groups) for name in group}
    known = pd.Series({name: place[name] for name in strategies if name in place})
    tied = known.rank()
    whole = known.rank(method="first")
    return float(((tied - tied.mean()) ** 2).sum() / ((whole - whole.mean()) ** 2).sum())
