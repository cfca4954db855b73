"""The claims of TIME (arXiv 2412.06712), each as comparisons of scores that could come out either way.

The claims are cited from public summaries of the paper, not from its tables. Effects are in GM (the geometric mean of KA and ZS)
at the last task unless a part says otherwise. All strategies in a comparison share stream, base, recipe, budget and evaluation.

Invariant: "the best" means the best on the validation split of the tuning order (`Tuned`), so no judged number affects the
choice; a part whose study or split of ZS is missing is left out.
"""

from collections.abc import Callable
from typing import Any

import pandas as pd

from pipeline.claims.contrasts import (
    AVERAGED,
    BASELINE,
    BEST_IN_TIME,
    BUDGETS,
    CELLS,
    DATASETS,
    GROUPS,
    HORIZONS,
    MULTITASK,
    NO_REPLAY,
    OFFLINE,
    OFFLINE_AVERAGE,
    OFFLINE_CELL,
    RATES,
    SIZES,
    ZERO_SHOT,
    across,
    apart,
    difference,
    ends,
    explained_variance,
    merged_cells,
    of_groups,
    step_of,
    tuned_only,
)  # fmt: skip
from pipeline.claims.judge import POINT, Claim, Part, kept_order
from pipeline.claims.results import Findings
from pipeline.claims.tuning import Tuned


def claims_of(found: Findings, tuned: Tuned) -> tuple[Claim, ...]:
    """C1 to C8 of a finished reproduction."""
    return (
        time_matters(found, tuned), techniques_alike(found, tuned), replay_and_recency(found), strategy_over_technique(found),
        best_in_time(found, tuned), scaling(found), multitask(found), horizons(found, tuned),
    )  # fmt: skip


def elsewhere(found: Findings, what: str, measured: Callable[..., pd.Series]) -> list[Part]:
    """A comparison in the other settings that were studied: dataset after dataset, and the longest stream. It decides nothing."""
    parts = []
    if found.has(DATASETS):
        parts.append(Part("datasets", f"{what}, dataset after dataset", measured(DATASETS), beside=True))
    if found.has(HORIZONS):
        longest = max(found.final(HORIZONS)["tasks"])
        parts.append(Part("long", f"{what}, {longest} tasks", measured(HORIZONS, tasks=longest), beside=True))
    return parts


def time_matters(found: Findings, tuned: Tuned) -> Claim:
    """C1: offline merging, even by its best technique, is worse than continual fine-tuning over time."""
    with_replay, without = tuned.offline(True), tuned.offline(False)

    def behind(study: str, metric: str = "gm", **more: Any) -> pd.Series:
        return difference(
            found, study, BASELINE, with_replay if study == CELLS else OFFLINE_AVERAGE, metric, **more
        )

    parts = [
        Part("gm", f"continual fine-tuning with replay above offline merging with replay by its best technique ({tuned.technique[True]})", behind(CELLS)),
        Part("ka", f"continual fine-tuning with replay above offline merging with replay ({tuned.technique[True]}), in KA", behind(CELLS, "ka")),
        *apart("the same, in", lambda metric: behind(CELLS, metric), ("zs", "zs_replayed", "zs_never_replayed")),
        Part("base", "offline merging with replay above zero-shot: what it adds to the base",
             difference(found, CELLS, with_replay, ZERO_SHOT), beside=True),
    ]  # fmt: skip
    parts += elsewhere(found, "the first comparison by averages", behind)
    parts += [
        Part("no_replay", "the first comparison by averages, without replay in either", behind(NO_REPLAY), beside=True),
        Part("no_replay_ka", "the same without replay, in KA", behind(NO_REPLAY, "ka"), beside=True),
        Part("no_replay_base", "continual fine-tuning without replay above zero-shot",
             difference(found, NO_REPLAY, BASELINE, ZERO_SHOT), beside=True),
    ]  # fmt: skip
    if found.has(OFFLINE):
        parts.append(Part("no_replay_best", f"offline merging without replay by its best technique ({tuned.technique[False]}) above zero-shot",
                          across(found.metric(OFFLINE, **without, replay=False, params=tuned_only(found, without)),
                                  found.metric(NO_REPLAY, **ZERO_SHOT)), beside=True))  # fmt: skip
    for rate in sorted(set(found.final(RATES)["lr"]), reverse=True) if found.has(RATES) else ():
        parts.append(
            Part(
                f"rate_{rate:g}",
                f"without replay at a learning rate of {rate:g}",
                behind(RATES, lr=rate),
                beside=True,
            )
        )
    return Claim(
        "C1",
        "Accounting for time is crucial: offline merging does poorly when tasks arrive over time",
        "offline strategies fall behind a sequential replay baseline, above all in knowledge accumulation",
        tuple(parts),
    )


def techniques_alike(found: Findings, tuned: Tuned) -> Claim:
    """C2: no offline technique is far better than averaging, measured by the gap between averaging and the baseline."""
    offline = found.final(OFFLINE, **OFFLINE_CELL, replay=False)
    plain = found.metric(OFFLINE, **OFFLINE_AVERAGE, replay=False, params="{}")
    chosen: dict[str, Any] = {**tuned.offline(False), "replay": False}
    best = found.metric(OFFLINE, **chosen, params=tuned_only(found, chosen))
    gap = found.metric(OFFLINE, **BASELINE) - plain
    one_each = offline[(offline["technique"] != "average") | (offline["params"] == "{}")]
    by_replicate = one_each.groupby("replicate")["gm"]
    middle = by_replicate.quantile(0.75) - by_replicate.quantile(0.25)
    count = one_each["technique"].nunique()
    replayed = found.metric(CELLS, **OFFLINE_AVERAGE)
    gain = found.metric(CELLS, **tuned.offline(True)) - replayed
    zero = found.metric(NO_REPLAY, **ZERO_SHOT)
    return Claim(
        "C2",
        "Offline techniques lie close together; sophisticated ones gain little over weighted averaging",
        "all offline techniques land close together",
        (
            Part("gain", f"without replay: half of what separates averaging from the replay baseline, less what the best of {count} techniques "
                 f"({tuned.technique[False]}) gains over averaging", gap / 2 - (best - plain), margin=0),
            Part("spread", "without replay: half of that gap, less the distance between the upper and lower quartile of the techniques", gap / 2 - middle, margin=0),
            Part("replay", f"with replay: half of the gap, less what the best technique ({tuned.technique[True]}) gains over averaging",
                 (found.metric(CELLS, **BASELINE) - replayed) / 2 - gain, margin=0),
            Part("replay_gain", "with replay: what the best technique gains over averaging", gain, beside=True),
            Part("base", "without replay: the best technique above zero-shot", across(best, zero), beside=True),
            Part("average_base", "without replay: averaging above zero-shot", across(plain, zero), beside=True),
        ),
        (f"Without replay the gap is {gap.mean():.3f}, the best technique gains {(best - plain).mean():.3f}, and the middle half of the "
         f"techniques spans {middle.mean():.3f}: averaging ends at {plain.mean():.3f}, the best technique at {best.mean():.3f}, zero-shot at {zero.mean():.3f}.",),
    )  # fmt: skip


def replay_and_recency(found: Findings) -> Claim:
    """C3: replay and weights that grow with time help offline merging, without closing the gap."""
    linear = '{"schedule": "linear"}'

    def average(metric: str, replay: bool, params: str = "{}") -> pd.Series:
        return found.metric(OFFLINE, metric, **OFFLINE_AVERAGE, replay=replay, params=params)

    def of_replay(metric: str) -> pd.Series:
        return average(metric, True) - average(metric, False)

    return Claim(
        "C3",
        "Replay and recency-weighted averaging both improve offline merging, without closing the gap",
        "non-uniform weights and replay improve on pure offline merging",
        (
            Part("replay", "replay above none, uniform average", of_replay("gm")),
            Part("recency", "linear weights above uniform ones, no replay", average("gm", False, linear) - average("gm", False)),
            Part("gap", "continual fine-tuning with replay still above both together",
                 found.metric(OFFLINE, **BASELINE) - average("gm", True, linear)),
            *apart("replay above none, in", of_replay),
            Part("recency_replay", "linear weights above uniform ones, with replay", average("gm", True, linear) - average("gm", True), beside=True),
            Part("recency_ka", "linear weights above uniform ones in KA, no replay", average("ka", False, linear) - average("ka", False), beside=True),
            Part("base", "the uniform average with replay above zero-shot: what is left of the gain over the base",
                 across(average("gm", True), found.metric(CELLS, **ZERO_SHOT)), beside=True),
        ),
    )  # fmt: skip


def strategy_over_technique(found: Findings) -> Claim:
    """C4: initialization and deployment explain more of the scores than the technique."""
    everywhere, in_time = explained_variance(found), explained_variance(found, offline=False)
    over, later = (
        {
            column: lines.groupby(["replicate", fixed])["gm"]
            .agg(lambda gm: gm.max() - gm.min())
            .groupby("replicate")
            .mean()
            for column, fixed in (("cell", "technique"), ("technique", "cell"))
        }
        for lines in (merged_cells(found), merged_cells(found, offline=False))
    )
    return Claim(
        "C4",
        "Initialization and deployment matter far more than the technique",
        "initialization and deployment choices dominate the choice of technique",
        (
            Part("all", "share of the variance of GM that strategies (init x deploy) explain, less the share that has to do with the technique "
                 "(its own and the interplay)", 2 * everywhere["cell"] - 1, margin=0),
            Part("in_time", "share of the variance of GM that strategies explain, less the share that has to do with the technique, among strategies "
                 "that account for time (without `init: base`)", 2 * in_time["cell"] - 1, margin=0),
            Part("range", "range of GM over strategies with the technique fixed, less range over techniques with the strategy fixed",
                 over["cell"] - over["technique"], beside=True),
            Part("range_in_time", "range over strategies less range over techniques, without `init: base`", later["cell"] - later["technique"], beside=True),
        ),
        (f"Strategies range over {over['cell'].mean():.3f}, techniques over {over['technique'].mean():.3f}; "
         f"without `init: base` over {later['cell'].mean():.3f} and {later['technique'].mean():.3f}.",),
    )  # fmt: skip


def best_in_time(found: Findings, tuned: Tuned) -> Claim:
    """C5: EMA initialization with EMA deployment has the best balance of KA and ZS."""

    def ahead(study: str, metric: str = "gm", **more: Any) -> pd.Series:
        return difference(found, study, BEST_IN_TIME, tuned.rival(study != NO_REPLAY), metric, **more)

    def of_tuning(metric: str) -> pd.Series:
        return difference(found, CELLS, BEST_IN_TIME, BASELINE, metric)

    rival, without = (" → ".join(tuned.strategy[replay]) for replay in (True, False))
    parts = [
        Part("replay", f"Best-in-TIME above the best other strategy ({rival}), with replay", ahead(CELLS)),
        Part("no_replay", f"Best-in-TIME above the best other strategy ({without}), without replay", ahead(NO_REPLAY)),
        Part("tuned", "Best-in-TIME above continual fine-tuning, both with replay", of_tuning("gm"), beside=True),
        *apart("the same, in", of_tuning),
        Part("stream", "Best-in-TIME above continual fine-tuning, both with replay, mean over all tasks", of_tuning("stream_gm"), beside=True),
        *apart("the same over all tasks, in", lambda metric: of_tuning(f"stream_{metric}"), prefix="stream_"),
        Part("tuned_no_replay", "Best-in-TIME above continual fine-tuning, both without replay",
             difference(found, NO_REPLAY, BEST_IN_TIME, BASELINE), beside=True),
        Part("offline", f"Best-in-TIME above offline merging by its best technique ({tuned.technique[True]}), with replay",
             difference(found, CELLS, BEST_IN_TIME, tuned.offline(True)), beside=True),
    ]  # fmt: skip
    parts += elsewhere(found, f"above {rival} with replay", ahead)
    return Claim(
        "C5",
        "EMA initialization with EMA deployment (Best-in-TIME) gives the best balance",
        "best KA/ZS balance, consistently",
        tuple(parts),
    )


def scaling(found: Findings) -> Claim:
    """C6: Best-in-TIME gains from larger models and from more compute."""
    sizes = list(dict.fromkeys(found.final(SIZES)["model"]))
    low, high = ends(found)

    def by_size(strategy: dict[str, Any], metric: str = "gm") -> pd.Series:
        return found.metric(SIZES, metric, **strategy, model=sizes[-1]) - found.metric(
            SIZES, metric, **strategy, model=sizes[0]
        )

    def by_compute(strategy: dict[str, Any], metric: str = "gm") -> pd.Series:
        return found.metric(BUDGETS, metric, **strategy, multiplier=high) - found.metric(
            BUDGETS, metric, **strategy, multiplier=low
        )

    of = BEST_IN_TIME
    parts = [
        Part("size", f"GM of {sizes[-1]} above that of {sizes[0]}", by_size(of)),
        Part("compute", f"GM at {high:g} times the budget above that at {low:g}", by_compute(of)),
        *apart("by size, in", lambda metric: by_size(of, metric), prefix="size_"),
        *apart("by compute, in", lambda metric: by_compute(of, metric), prefix="compute_"),
        Part("size_offline", "what it gains by size, less what offline merging gains", by_size(of) - by_size(OFFLINE_AVERAGE), beside=True),
        Part("size_tuned", "what it gains by size, less what continual fine-tuning with replay gains", by_size(of) - by_size(BASELINE), beside=True),
        Part("compute_offline", "what it gains by compute, less what offline merging gains", by_compute(of) - by_compute(OFFLINE_AVERAGE), beside=True),
        Part("compute_tuned", "what it gains by compute, less what continual fine-tuning with replay gains", by_compute(of) - by_compute(BASELINE), beside=True),
    ]  # fmt: skip
    if ZERO_SHOT["deploy"] in set(found.final(SIZES)["deploy"]):
        parts.append(Part("size_base", "what it gains by size, less what zero-shot gains: the larger base is a better start by itself", by_size(of) - by_size(ZERO_SHOT), beside=True))  # fmt: skip
    return Claim(
        "C6",
        "Best-in-TIME scales with model size and compute",
        "scales favourably from 62M to 1.37B parameters and with compute",
        tuple(parts),
    )


def multitask(found: Findings) -> Claim:
    """C7: Best-in-TIME comes near the multitask reference, the more so with compute."""
    low, high = ends(found)

    def zero(metric: str = "gm") -> pd.Series:
        return found.metric(
            BUDGETS, metric, **ZERO_SHOT, multiplier=low
        )  # one trajectory, which is independent of the budget

    def joint(multiplier: float, metric: str = "gm") -> pd.Series:
        return found.metric(MULTITASK, metric, init="joint", multiplier=multiplier)

    def ours(multiplier: float, metric: str = "gm") -> pd.Series:
        return found.metric(BUDGETS, metric, **BEST_IN_TIME, multiplier=multiplier)

    def reached(multiplier: float) -> pd.Series:
        return across(ours(multiplier), zero()) / across(joint(multiplier), zero())

    return Claim(
        "C7",
        "Best-in-TIME approaches the multitask reference, and matches or exceeds it at higher compute",
        "approaches the multitask upper bound in many settings; matches or exceeds it with more compute",
        (
            Part("nearer", f"share of the multitask gain over zero-shot that it reaches at {high:g} times the budget, less that at {low:g}",
                 reached(high) - reached(low)),
            Part("within", f"GM less that of multitask at {high:g} times the budget, no more than a point below", ours(high) - joint(high), bar=-POINT, margin=0),
            *apart(f"at {high:g} times the budget, Best-in-TIME less multitask in", lambda metric: ours(high, metric) - joint(high, metric)),
            Part("base", f"GM of Best-in-TIME at {high:g} times the budget above zero-shot", across(ours(high), zero()), beside=True),
        ),
        (f"It reaches {reached(low).mean():.0%} of the gain at {low:g} times the budget and {reached(high).mean():.0%} at {high:g}. "
         "Multitask training replays the pool but needs no buffer, because it holds all tasks.",),
    )  # fmt: skip


def horizons(found: Findings, tuned: Tuned) -> Claim:
    """C8: the order of similar strategies is the same in a longer stream of the same total budget."""
    rows = found.final(HORIZONS, **AVERAGED)
    rows = rows[rows["deploy"] != "base"]
    short, long = int(rows["tasks"].min()), int(rows["tasks"].max())
    table = rows.assign(strategy=rows["init"] + "/" + rows["deploy"]).pivot(
        index=["replicate", "tasks"], columns="strategy", values="gm"
    )
    replicates = sorted(set(rows["replicate"]))
    pairs = {name: (table.loc[(name, short)], table.loc[(name, long)]) for name in replicates}
    groups = [[one for one in group if one in table.columns] for group in GROUPS]
    leading = groups[:1]
    behind = {
        tasks: difference(found, HORIZONS, BASELINE, OFFLINE_AVERAGE, tasks=tasks) for tasks in (short, long)
    }
    return Claim(
        "C8",
        "The ranking holds at longer horizons",
        "several horizons are studied; that the ranking holds there is our reading, not a claim of the paper",
        (
            Part("order", f"order within groups of like strategies at {short} and at {long} tasks (Kendall's tau; 1: the same, 0: as by chance)",
                 pd.Series({name: kept_order(*pair, groups) for name, pair in pairs.items()}), margin=0, step=step_of(groups)),
            Part("behind", f"continual fine-tuning above offline merging at {long} tasks", behind[long]),
            Part("leading", "the order within the leading group alone (tau)",
                 pd.Series({name: kept_order(*pair, leading) for name, pair in pairs.items()}), margin=0, beside=True, step=step_of(leading)),
            Part("all", "the order of all strategies (rank correlation); the groups alone, whatever the order within them, make most of it",
                 pd.Series({name: pair[0].corr(pair[1], method="spearman") for name, pair in pairs.items()}), margin=0, beside=True),
            Part("groups", "rank correlation that the three groups alone give",
                 pd.Series({name: of_groups(pair[0].index, groups) for name, pair in pairs.items()}), margin=0, beside=True),
            Part("more", f"continual fine-tuning above offline merging, by more at {long} than at {short} tasks", behind[long] - behind[short], beside=True),
        ),
    )  # fmt: skip
