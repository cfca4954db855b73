"""Heat maps: scores of datasets over t, the difference of two trajectories, technique by strategy, similarity of experts.

Invariant: darker means more in all of them; for signed values white is zero and both ends are dark.
"""

import json

import altair as alt
import pandas as pd

from merge_service.similarity import CLASH_CONFLICT, CLASH_COSINE
from pipeline.report.data import Data, NoData
from pipeline.report.frames import RECALL
from pipeline.report.style import GRADIENT, MUCH, SIGNED, Choice, Figure, dark, named, short_score, sized

WRITTEN = 24
"""With more columns than this, cells are too narrow for their numbers; these then appear on hovering."""
LARGE = 0.5
"""Differences of scores from this size on are drawn equally dark."""


def matrix(data: Data) -> Figure:
    """Score per dataset and t of one trajectory, selected in a drop-down."""
    base = _cells(data, "scores").transform_filter("datum.trajectory == chosen").encode(
        tooltip=["row:N", "role:N", "t:O", alt.Tooltip("score:Q", format=".3f"), alt.Tooltip("arrival:Q", title="arrives at t")],
    )  # fmt: skip
    what = "Score (fraction; recall@5 where named)" if _recall(data) else "Accuracy (fraction)"
    colour = alt.Color("score:Q", title=what, scale=alt.Scale(scheme=MUCH, domain=[0, 1]), legend=alt.Legend(**GRADIENT))  # fmt: skip
    layers = [base.mark_rect(stroke="white").encode(color=colour)]
    layers += _numbers(data, base, short_score("score"), "datum.score > 0.55")
    layers.append(base.transform_filter("datum.t == datum.arrival").mark_rect(filled=False, stroke="black", strokeWidth=2))  # fmt: skip
    return Figure(
        "matrix",
        "Score per dataset over time",
        "Darker is better: "
        + ("accuracy, and recall@5 of the retrieval sets, which are named so. " if _recall(data) else "accuracy. ")
        + "A frame marks the t at which a task arrives; a row that pales to the right of it is being forgotten, and held-out sets are below, apart.",
        sized(alt.layer(*layers), alt.Step(22)),
        ("scores",),
        data.scores.drop(columns="row"),
        (Choice("chosen", "Trajectory", "scores", "trajectory", data.best),),
    )  # fmt: skip


def difference(data: Data) -> Figure:
    """Score per dataset and t of one trajectory, less that of another; both are selected in drop-downs."""
    if data.best == data.second:
        raise NoData("one trajectory only")
    base = (
        _cells(data, "scores")
        .transform_filter("datum.trajectory == one || datum.trajectory == other")
        .transform_calculate(signed="datum.trajectory == one ? datum.score : -datum.score")
        .transform_aggregate(difference="sum(signed)", both="count()", groupby=["t", "row"])
        .transform_filter("datum.both == 2")
        .encode(tooltip=["row:N", "t:O", alt.Tooltip("difference:Q", format="+.3f")])
    )
    colour = alt.Color(
        "difference:Q", title="First less second (fraction)",
        scale=alt.Scale(scheme=SIGNED, reverse=True, domain=[-LARGE, LARGE], clamp=True), legend=alt.Legend(**GRADIENT),
    )  # fmt: skip
    layers = [base.mark_rect(stroke="white").encode(color=colour)]
    layers += _numbers(data, base, "abs(datum.difference) < 0.005 ? '0' : replace(format(datum.difference, '+.2f'), '0.', '.')", "abs(datum.difference) > 0.3")  # fmt: skip
    pair = data.scores[data.scores["trajectory"].isin([data.best, data.second])]
    table = pair.pivot_table("score", index=["t", "dataset"], columns="trajectory", sort=False).reset_index()
    return Figure(
        "difference",
        "Difference of two trajectories",
        "Blue: the first is better, orange: the second; the darker, the more. At first the advised trajectory and its runner-up. Rows as above.",
        sized(alt.layer(*layers), alt.Step(22)),
        ("scores",),
        table,
        (
            Choice("one", "First", "scores", "trajectory", data.best),
            Choice("other", "less second", "scores", "trajectory", data.second),
        ),
    )


def techniques(data: Data) -> Figure:
    """Technique x (init, deploy): GM at the last t, of groups that are equal in everything else."""
    rows = data.last[~data.last["reference"]]
    sizes = rows.groupby("slice", sort=False).apply(lambda one: len(one.groupby(["choice", "strategy"])), include_groups=False)  # fmt: skip
    if sizes.empty or sizes.max() < 2:
        reason = "no two groups differ in strategy or technique and in nothing else" if len(rows) > 1 else "one group only"  # fmt: skip
        raise NoData(reason)
    best = data.last.loc[data.last["group"] == data.advice.group, "slice"].iloc[0]
    first = best if sizes.get(best, 0) > 1 else sizes.idxmax()
    middle = (rows["gm"].min() + 1.2 * rows["gm"].max()) / 2.2
    base = named("last").transform_filter("!datum.reference && datum.slice == slice").transform_aggregate(
        gm="mean(gm)", groups="count()", groupby=["choice", "strategy"]
    ).encode(
        alt.X("strategy:N", title="init → deploy", sort=None, axis=alt.Axis(labelAngle=-30, labelLimit=160)),
        alt.Y("choice:N", title="Technique", sort=None, axis=alt.Axis(labelLimit=200)),
        tooltip=["choice:N", "strategy:N", alt.Tooltip("gm:Q", title="GM", format=".3f"), "groups:Q"],
    )  # fmt: skip
    bounds = [float(rows["gm"].min()), float(rows["gm"].max())]
    colour = alt.Color("gm:Q", title="GM at the last t (fraction)", scale=alt.Scale(scheme=MUCH, domain=bounds), legend=alt.Legend(**GRADIENT))  # fmt: skip
    chart = alt.layer(
        base.mark_rect(stroke="white").encode(color=colour),
        base.mark_text(fontSize=11).encode(text=alt.Text("gm:Q", format=".3f"), color=dark(f"datum.gm > {middle:.4f}")),
    )  # fmt: skip
    several = rows["slice"].nunique() > 1
    held = (
        f"All cells are at the same setting, which is chosen above the figure ({len(sizes)} of them)."
        if several
        else "The groups are equal in everything else."
    )
    return Figure(
        "techniques",
        "Technique by strategy",
        f"Darker is better; - merges nothing. {held} Columns that differ more than rows say that the strategy matters more than the technique.",
        sized(chart, alt.Step(30)),
        ("last",),
        rows[["slice", "choice", "strategy", "group", "gm", "seeds"]],
        (Choice("slice", "At", "last", "slice", str(first)),),
    )


def similarity(pairs: pd.DataFrame | None) -> Figure:
    """Cosine and sign conflict of the task vectors of experts; `pairs` has part, one, other, cosine and conflict."""
    if pairs is None or pairs["cosine"].isna().all():
        raise NoData("the best strategy has fewer than two experts with weights in the store")
    order, parts = list(dict.fromkeys(pairs["one"])), list(dict.fromkeys(pairs["part"]))
    base = named("similarity").transform_filter("datum.part == part").encode(
        alt.X("other:N", title=None, sort=order, axis=alt.Axis(labelAngle=-30, labelLimit=140)),
        alt.Y("one:N", title=None, sort=order, axis=alt.Axis(labelLimit=180)),
        tooltip=["one:N", "other:N", alt.Tooltip("cosine:Q", format=".3f"), alt.Tooltip("conflict:Q", title="sign conflict", format=".3f")],
    )  # fmt: skip
    colour = alt.Color("cosine:Q", title="Cosine", scale=alt.Scale(scheme=SIGNED, domain=[-1, 1], reverse=True), legend=alt.Legend(**GRADIENT))  # fmt: skip
    chart = alt.layer(
        base.mark_rect(stroke="white").encode(color=colour),
        base.mark_text(fontSize=11).encode(text=alt.Text("cosine:Q", format=".2f"), color=dark("abs(datum.cosine) > 0.6")),
    )  # fmt: skip
    return Figure(
        "similarity",
        "How alike the experts are",
        "Cosine of task vectors (expert - base) of the advised strategy's experts: white (0) is unrelated, orange (below) two experts undo each other. "
        f"Hover for the share of clearly moved weights whose signs differ (unrelated: one half). {_clashes(pairs, parts[0])}",
        sized(chart, alt.Step(30)),
        ("similarity",),
        pairs,
        (Choice("part", "Part", "similarity", "part", parts[0]),),
    )


def _cells(data: Data, frame: str) -> alt.Chart:
    """Datasets under their headings, over t."""
    if data.scores.empty:
        raise NoData("no dataset has been scored")
    heads = json.dumps(list(data.headings))
    labels = alt.Axis(
        labelLimit=190, domain=False, ticks=False,
        labelFontWeight=alt.condition(f"indexof({heads}, datum.label) >= 0", alt.value("bold"), alt.value("normal")),
    )  # fmt: skip
    return named(frame).encode(
        alt.X("t:O", title="t (tasks seen)", axis=alt.Axis(labelAngle=0)),
        alt.Y("row:N", title=None, scale=alt.Scale(domain=list(data.rows)), axis=labels),
    )


def _numbers(data: Data, base: alt.Chart, text: str, white: str) -> list[alt.Chart]:
    if data.scores["t"].nunique() > WRITTEN:
        return []
    written = base.transform_calculate(text=text).mark_text(fontSize=11)
    return [written.encode(text="text:N", color=dark(white))]


def _recall(data: Data) -> bool:
    return bool((data.scores["measure"] == RECALL).any())


def _clashes(pairs: pd.DataFrame, part: str) -> str:
    """A sentence that names the pairs of experts whose merge is likely to clash."""
    whole = pairs[(pairs["part"] == part) & (pairs["one"] < pairs["other"])]
    bad = whole[(whole["cosine"] < CLASH_COSINE) | (whole["conflict"] > CLASH_CONFLICT)].nsmallest(
        3, "cosine"
    )
    if bad.empty:
        return "No two of them clash."
    named_pairs = ", ".join(f"{one} and {other}" for one, other in zip(bad["one"], bad["other"]))
    return f"Merging these is likely to clash: {named_pairs}."
