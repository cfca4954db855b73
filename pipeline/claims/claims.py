"""The claims of TIME (arXiv 2412.06712), each as comparisons of final scores that could come out either way.

Claims and their sources as in the paper's abstract and its summaries; effects are in GM, the geometric mean of KA and ZS, unless
a part says otherwise, and all strategies beside one another share stream, base, recipe, budget and evaluation. Invariant: what
is compared with the best of several is compared with the best in each replicate, so the choice never favours the claim.
"""

from typing import Any

import pandas as pd

from merge_service.errors import UserError
from pipeline.claims.judge import POINT, Judged, Part, shares
from pipeline.claims.results import Findings

CELLS, OFFLINE, NO_REPLAY, BUDGETS, SIZES, WEIGHTS, HORIZONS, DATASETS = STUDIES = (
    "cells", "offline", "no_replay", "budgets", "sizes", "ema_weights", "horizons", "datasets",
)  # fmt: skip
OFFLINE_CELL = {"init": "base", "deploy": "all"}
BASELINE = {"init": "latest", "deploy": "latest"}
BEST_IN_TIME = {"init": "ema", "deploy": "ema", "technique": "average"}
AVERAGED = {"technique": ["average", "-"]}


def judge_all(found: Findings) -> tuple[Judged, ...]:
    """C1 to C8 of a finished reproduction."""
    return (
        time_matters(found), techniques_alike(found), replay_and_recency(found), strategy_over_technique(found),
        best_in_time(found), scaling(found), multitask(found), horizons(found),
    )  # fmt: skip


def time_matters(found: Findings) -> Judged:
    """C1: offline merging, even by its best technique, falls behind training on in time."""

    def behind(study: str, metric: str, **more: Any) -> pd.Series:
        return found.metric(study, metric, **BASELINE, **more) - best(
            found, study, metric, **OFFLINE_CELL, **more
        )

    longest = max(found.final(HORIZONS)["tasks"])
    return Judged(
        "C1",
        "Accounting for time is crucial: offline merging does poorly when tasks arrive over time",
        "offline strategies fall behind a sequential replay baseline, above all in knowledge accumulation",
        (
            Part("continual fine-tuning with replay above offline merging with its best technique", behind(CELLS, "gm")),
            Part("the same, in KA", behind(CELLS, "ka")),
            Part("the same in GM, dataset after dataset", behind(DATASETS, "gm"), beside=True),
            Part(f"the same in GM, {longest} tasks", behind(HORIZONS, "gm", tasks=longest), beside=True),
            Part("the same in KA, without replay in either", behind(NO_REPLAY, "ka"), beside=True),
            Part("the same in GM, without replay in either", behind(NO_REPLAY, "gm"), beside=True),
        ),
    )  # fmt: skip


def techniques_alike(found: Findings) -> Judged:
    """C2: among offline techniques, none gets far above averaging; the yardstick is what averaging lacks to the baseline."""
    offline = found.final(OFFLINE, **OFFLINE_CELL, replay=False)
    plain = found.metric(OFFLINE, **OFFLINE_CELL, replay=False, technique="average", params="{}")
    gap = found.metric(OFFLINE, **BASELINE) - plain
    one_each = offline[(offline["technique"] != "average") | (offline["params"] == "{}")]
    by_replicate = one_each.groupby("replicate")["gm"]
    middle = by_replicate.quantile(0.75) - by_replicate.quantile(0.25)
    count = one_each["technique"].nunique()
    replayed = found.metric(CELLS, **OFFLINE_CELL, technique="average")
    return Judged(
        "C2",
        "Offline techniques lie close together; sophisticated ones gain little over weighted averaging",
        "all offline techniques land close together",
        (
            Part(f"half of what separates averaging from the replay baseline, less what the best of {count} techniques gains over averaging",
                 gap / 2 - (by_replicate.max() - plain)),
            Part("half of that gap, less the distance between the upper and lower quartile of the techniques", gap / 2 - middle),
            Part("half of the gap with replay, less what the best technique gains over averaging there",
                 (found.metric(CELLS, **BASELINE) - replayed) / 2 - (best(found, CELLS, **OFFLINE_CELL) - replayed), beside=True),
        ),
        (f"The gap is {gap.mean():.3f}; the best technique gains {(by_replicate.max() - plain).mean():.3f}; the middle half of the "
         f"techniques spans {middle.mean():.3f}. Without replay averaging ends at {plain.mean():.3f}, the best technique at "
         f"{by_replicate.max().mean():.3f}, zero-shot at {found.metric(NO_REPLAY, init='base', deploy='base').mean():.3f}.",),
    )  # fmt: skip


def replay_and_recency(found: Findings) -> Judged:
    """C3: replay and weights that grow with time help offline merging, without closing the gap."""
    average = {**OFFLINE_CELL, "technique": "average"}
    plain = found.metric(OFFLINE, **average, replay=False, params="{}")
    replayed = found.metric(OFFLINE, **average, replay=True, params="{}")
    linear = '{"schedule": "linear"}'
    recent = found.metric(OFFLINE, **average, replay=False, params=linear)
    both = found.metric(OFFLINE, **average, replay=True, params=linear)
    return Judged(
        "C3",
        "Replay and recency-weighted averaging both improve offline merging, without closing the gap",
        "non-uniform weights and replay improve on pure offline merging",
        (
            Part("replay above none, uniform average", replayed - plain),
            Part("linear weights above uniform ones, no replay", recent - plain),
            Part("continual fine-tuning with replay still above both together", found.metric(OFFLINE, **BASELINE) - both),
            Part("linear weights above uniform ones, with replay", both - replayed, beside=True),
            Part("linear weights above uniform ones in KA, no replay",
                 found.metric(OFFLINE, "ka", **average, replay=False, params=linear)
                 - found.metric(OFFLINE, "ka", **average, replay=False, params="{}"), beside=True),
        ),
    )  # fmt: skip


def strategy_over_technique(found: Findings) -> Judged:
    """C4: where experts start and what is deployed explains more of the scores than how weights are combined."""
    explained = explained_variance(found)
    cell, rest = explained["cell"], explained["technique"] + explained["interplay"]
    lines = merged_cells(found)
    over = {
        column: lines.groupby(["replicate", fixed])["gm"]
        .agg(lambda gm: gm.max() - gm.min())
        .groupby("replicate")
        .mean()
        for column, fixed in (("cell", "technique"), ("technique", "cell"))
    }
    return Judged(
        "C4",
        "Initialization and deployment matter far more than the technique",
        "initialization and deployment choices dominate the choice of technique",
        (
            Part("share of the variance of GM that strategies (init x deploy) explain, less the share that has to do with the technique", cell - rest, margin=1 / 3),
            Part("range over strategies with the technique fixed, less range over techniques with the strategy fixed", over["cell"] - over["technique"]),
        ),
        (f"Strategies range over {over['cell'].mean():.3f}, techniques over {over['technique'].mean():.3f}.",),
    )  # fmt: skip


def best_in_time(found: Findings) -> Judged:
    """C5: EMA initialization with EMA deployment has the best balance of KA and ZS."""

    def ahead(study: str, metric: str = "gm", **more: Any) -> pd.Series:
        rows = found.final(study, **AVERAGED, **more)
        others = rows[((rows["init"] != "ema") | (rows["deploy"] != "ema")) & (rows["deploy"] != "base")]
        return found.metric(study, metric, **BEST_IN_TIME, **more) - others.groupby("replicate")[metric].max()

    longest = max(found.final(HORIZONS)["tasks"])
    return Judged(
        "C5",
        "EMA initialization with EMA deployment (Best-in-TIME) gives the best balance",
        "best KA/ZS balance, consistently",
        (
            Part("Best-in-TIME above the best other strategy, with replay", ahead(CELLS)),
            Part("Best-in-TIME above the best other strategy, without replay", ahead(NO_REPLAY)),
            Part("with replay, dataset after dataset", ahead(DATASETS), beside=True),
            Part(f"with replay, {longest} tasks", ahead(HORIZONS, tasks=longest), beside=True),
            Part("Best-in-TIME above continual fine-tuning, both with replay",
                 found.metric(CELLS, **BEST_IN_TIME) - found.metric(CELLS, **BASELINE), beside=True),
            Part("Best-in-TIME above continual fine-tuning, both without replay",
                 found.metric(NO_REPLAY, **BEST_IN_TIME) - found.metric(NO_REPLAY, **BASELINE), beside=True),
            Part("Best-in-TIME above offline merging with its best technique, with replay",
                 found.metric(CELLS, **BEST_IN_TIME) - best(found, CELLS, **OFFLINE_CELL), beside=True),
        ),
    )  # fmt: skip


def scaling(found: Findings) -> Judged:
    """C6: Best-in-TIME gains from larger models and from more compute."""
    sizes = list(dict.fromkeys(found.final(SIZES)["model"]))
    low, high = ends(found)
    small, large = sizes[0], sizes[-1]

    def grown(strategy: dict[str, str], study: str, column: str, start: Any, end: Any) -> pd.Series:
        return found.metric(study, **strategy, **{column: end}) - found.metric(
            study, **strategy, **{column: start}
        )

    offline = {**OFFLINE_CELL, "technique": "average"}
    of_size, of_compute = ("model", small, large), ("multiplier", low, high)
    return Judged(
        "C6",
        "Best-in-TIME scales with model size and compute",
        "scales favourably from 62M to 1.37B parameters and with compute",
        (
            Part(f"GM of {large} above that of {small}", grown(BEST_IN_TIME, SIZES, *of_size)),
            Part(f"GM at {high:g} times the budget above that at {low:g}", grown(BEST_IN_TIME, BUDGETS, *of_compute)),
            Part("what it gains by size, less what offline merging gains",
                 grown(BEST_IN_TIME, SIZES, *of_size) - grown(offline, SIZES, *of_size), beside=True),
            Part("what it gains by compute, less what offline merging gains",
                 grown(BEST_IN_TIME, BUDGETS, *of_compute) - grown(offline, BUDGETS, *of_compute), beside=True),
            Part("what it gains by size, less what continual fine-tuning with replay gains",
                 grown(BEST_IN_TIME, SIZES, *of_size) - grown(BASELINE, SIZES, *of_size), beside=True),
            Part("what it gains by compute, less what continual fine-tuning with replay gains",
                 grown(BEST_IN_TIME, BUDGETS, *of_compute) - grown(BASELINE, BUDGETS, *of_compute), beside=True),
        ),
    )  # fmt: skip


def multitask(found: Findings) -> Judged:
    """C7: Best-in-TIME comes near the multitask reference, the more so with compute."""
    low, high = ends(found)
    zero = found.metric(
        BUDGETS, init="base", deploy="base", multiplier=low
    )  # it is one trajectory: no budget bears on it

    def reached(multiplier: float) -> pd.Series:
        joint = found.metric(BUDGETS, init="joint", multiplier=multiplier)
        return (found.metric(BUDGETS, **BEST_IN_TIME, multiplier=multiplier) - zero) / (joint - zero)

    difference = found.metric(BUDGETS, **BEST_IN_TIME, multiplier=high) - found.metric(
        BUDGETS, init="joint", multiplier=high
    )
    return Judged(
        "C7",
        "Best-in-TIME approaches the multitask reference, and matches or exceeds it at higher compute",
        "approaches the multitask upper bound in many settings; matches or exceeds it with more compute",
        (
            Part(f"share of the multitask gain over zero-shot that it reaches at {high:g} times the budget, less that at {low:g}", reached(high) - reached(low)),
            Part(f"within one point of multitask at {high:g} times the budget (difference + .01)", difference + POINT),
        ),
        (f"It reaches {reached(low).mean():.0%} of the gain at {low:g} times the budget and {reached(high).mean():.0%} at {high:g}.",),
    )  # fmt: skip


def horizons(found: Findings) -> Judged:
    """C8: the ranking of strategies survives a longer stream of the same total budget."""
    rows = found.final(HORIZONS, **AVERAGED)
    rows = rows[rows["deploy"] != "base"]
    short, long = int(rows["tasks"].min()), int(rows["tasks"].max())
    table = rows.assign(strategy=rows["init"] + "/" + rows["deploy"]).pivot(
        index=["replicate", "tasks"], columns="strategy", values="gm"
    )
    alike = pd.Series(
        {
            replicate: table.loc[(replicate, short)].corr(table.loc[(replicate, long)], method="spearman")
            for replicate in sorted(set(rows["replicate"]))
        }
    )
    behind = {
        tasks: found.metric(HORIZONS, **BASELINE, tasks=tasks)
        - best(found, HORIZONS, **OFFLINE_CELL, tasks=tasks)
        for tasks in (short, long)
    }
    return Judged(
        "C8",
        "The ranking holds at longer horizons",
        "several horizons are studied; that the ranking holds there is our reading",
        (
            Part(f"rank correlation of the strategies' GM at {short} and {long} tasks", alike, margin=0.5),
            Part(f"offline merging still behind continual fine-tuning at {long} tasks", behind[long]),
            Part(f"by more than at {short} tasks", behind[long] - behind[short], beside=True),
        ),
    )  # fmt: skip


def best(found: Findings, study: str, metric: str = "gm", **where: Any) -> pd.Series:
    """The highest of the trajectories that are as `where` says, in each replicate."""
    return found.final(study, **where).groupby("replicate")[metric].max()


def ends(found: Findings) -> tuple[float, float]:
    """The least and the largest budget multiplier."""
    multipliers = found.final(BUDGETS)["multiplier"]
    return float(multipliers.min()), float(multipliers.max())


def merged_cells(found: Findings) -> pd.DataFrame:
    """The final points of all cells in which a technique has a say, with `cell` = init/deploy."""
    rows = found.final(CELLS)
    rows = rows[rows["technique"] != "-"]
    return rows.assign(cell=rows["init"] + "/" + rows["deploy"])


def explained_variance(found: Findings) -> pd.DataFrame:
    """Per replicate the shares of the variance of GM (`judge.shares`): of the cells (init x deploy) and the technique, and within
    the cells that deploy a merge (all, ema) those of init, deploy and the technique's main effects.
    """
    rows = merged_cells(found)
    answer = {}
    for replicate, lines in rows.groupby("replicate"):
        whole = shares(lines, "gm", "cell", "technique")
        part = lines[lines["deploy"].isin(["all", "ema"])]
        by_init = shares(part.assign(rest=part["deploy"] + part["technique"]), "gm", "init", "rest")["init"]
        by_deploy = shares(part.assign(rest=part["init"] + part["technique"]), "gm", "deploy", "rest")[
            "deploy"
        ]
        by_technique = shares(part, "gm", "cell", "technique")["technique"]
        answer[replicate] = {
            **whole,
            "init_alone": by_init,
            "deploy_alone": by_deploy,
            "technique_alone": by_technique,
        }
    if not answer:
        raise UserError(f"study {CELLS} has no cell with a technique")
    return pd.DataFrame(answer).T
