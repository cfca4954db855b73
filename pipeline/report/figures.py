"""The figures of a report, one small function each, over the frames of `frames.py` and `analysis.py`.

Invariant: a figure that has nothing to show raises `NoData` with the reason and is never drawn empty; every chart names its
data instead of holding them, so that a page carries each row once; scores are fractions in [0, 1].
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import altair as alt
import pandas as pd

from merge_service.similarity import CLASH_CONFLICT, CLASH_COSINE
from pipeline.expand import JOINT_TASK
from pipeline.report import analysis, frames
from pipeline.results import OF_GROUPS

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C7F00")
"""Okabe and Ito's, the best group first; their yellow is darkened to be legible on white, black is the references'."""
GREY, BLACK, OTHER = "#c4c4c4", "#000000", "other groups"
AXES = ("model", "init", "deploy", "technique", "budget", "seed")
"""What a page filters by, each a signal `only_<axis>` in every chart that follows it."""
WIDTH, HEIGHT = 640, 400
LEGEND = alt.Legend(labelLimit=340, symbolOpacity=1)


class NoData(Exception):
    """Why a figure cannot be drawn of these results; said in its place."""


@dataclass(frozen=True)
class Figure:
    """A chart and what a person needs to read it. `data` are the frames it names, `table` its numbers as a CSV has them."""

    name: str
    title: str
    reading: str
    chart: Any
    data: tuple[str, ...]
    table: pd.DataFrame


@dataclass(frozen=True)
class Data:
    """What the figures draw. `last` has a row per group, `best` is the trajectory that a matrix shows first."""

    points: pd.DataFrame
    last: pd.DataFrame
    scores: pd.DataFrame
    advice: analysis.Advice
    best: str
    datasets: tuple[str, ...]


def prepare(answer: Mapping[str, Any]) -> Data:
    """The frames of `results.json`, with each group's part (coloured, grey, reference). Raises NoData without a score."""
    points = frames.points(answer)
    points = points[points["gm"].notna()].copy()
    last = analysis.last(points)
    last["joint"] = last["task"] == JOINT_TASK
    last["reference"] = last["joint"] | (last["deploy"] == "base")
    deployable = last[~last["joint"]]
    advice = analysis.recommend(deployable)
    if advice is None:
        raise NoData("no point has a KA and a ZS yet")
    last["front"] = analysis.pareto(deployable).reindex(last.index, fill_value=False)
    coloured = last[~last["reference"]].nlargest(len(COLOURS), "gm")["group"]
    last["shown"] = last["group"].where(last["group"].isin(coloured) | last["reference"], OTHER)
    last["strategy"] = last["init"] + " → " + last["deploy"]
    grouped = chain.from_iterable(answer.get("zero_shot_groups", {}).values())
    of_group = last.set_index("group")[["shown", "reference", "joint"]]
    return Data(
        points.join(of_group, on="group", how="inner"),
        last,
        frames.scores(answer),
        advice,
        points.loc[points["group"] == advice.group, "trajectory"].iloc[0],
        tuple(dict.fromkeys((*answer["adaptation"], *grouped, *answer["held_out"]))),
    )


def plane(data: Data) -> Figure:
    """KA against ZS, one path per group over t."""
    paths = data.points[~data.points["joint"]]
    if paths.groupby("group")["t"].nunique().max() < 2:
        raise NoData("no group has been scored at two points in time")
    x = alt.X(
        "ka:Q",
        title="KA: mean accuracy on the tasks (fraction)",
        scale=alt.Scale(zero=False),
        axis=alt.Axis(tickCount=8),
    )
    y = alt.Y(
        "zs:Q", title="ZS: mean accuracy on held-out sets (fraction)", scale=alt.Scale(zero=False, padding=24)
    )
    moved = _over_time("ka", "zs").transform_filter("!datum.reference").encode(x, y, order="t:O")
    final = _named("last").transform_filter(_kept(seed=False)).encode(x, y, tooltip=_tooltip())
    known = final.transform_filter("datum.reference")
    references = [
        known.mark_point(filled=True, color=BLACK, size=90, shape="diamond", opacity=1),
        known.mark_text(dy=-12, fontSize=11).encode(text="group:N"),
    ] if data.last["reference"].any() else []  # fmt: skip
    chart = _layers(
        data.last["shown"],
        moved.transform_filter(_is(OTHER)).mark_line(color=GREY, opacity=0.5, strokeWidth=1).encode(detail="group:N", tooltip=["group:N", "t:O"]),
        moved.transform_filter(_is_not(OTHER)).mark_line(point={"size": 22}, strokeWidth=2).encode(color=_colour(data), detail="group:N", tooltip=_tooltip_t("ka", "zs")),
        final.transform_filter("datum.front").mark_line(color=BLACK, strokeDash=[4, 3], strokeWidth=1).encode(order="ka:Q"),
        final.transform_filter("datum.front").mark_point(color=BLACK, size=90, strokeWidth=1.2),
        *references,
    ).properties(width=WIDTH, height=HEIGHT)  # fmt: skip
    return Figure(
        "plane",
        "Knowledge accumulation against zero-shot retention",
        "Up and to the right is better; a path runs from t = 0 (the base) to the last task, mean over seeds. "
        "Diamonds are references, circles on the dashed line the Pareto front at the last t: no other group is better in both.",
        chart,
        ("points", "last"),
        data.last[["group", "t", "seeds", "ka", "zs", "gm", "front", "reference", *OF_GROUPS]],
    )


def over_time(data: Data) -> Figure:
    """GM over t, with the range of the seeds."""
    if data.points["t"].nunique() < 2:
        raise NoData("one point in time only")
    x = alt.X("t:Q", title="t (tasks seen)", axis=alt.Axis(tickMinStep=1, format="d"))
    scale = alt.Scale(zero=False)
    base = _over_time("gm").encode(x)
    y = alt.Y("gm:Q", title="GM of KA and ZS (fraction)", scale=scale)
    named = base.transform_filter(_is_not(OTHER)).encode(detail="group:N")
    colour = _colour(data, references=True)
    fills = json.dumps(dict(zip(colour["scale"]["domain"], colour["scale"]["range"])))
    band = alt.Fill("fill:N", scale=None)  # of its own, or the legend takes the pale colours of the bands
    coloured = named.encode(color=colour)
    chart = _layers(
        data.last["shown"],
        base.transform_filter(_is(OTHER)).mark_line(color=GREY, opacity=0.5, strokeWidth=1).encode(y, detail="group:N", tooltip=["group:N", "t:O"]),
        named.transform_calculate(fill=f"({fills})[datum.shown]").mark_area(opacity=0.15).encode(alt.Y("gm_low:Q", scale=scale, title="GM of KA and ZS (fraction)"), alt.Y2("gm_high:Q"), band),
        coloured.mark_line(strokeWidth=2).encode(y),
        coloured.mark_point(filled=True, size=30, opacity=1).encode(y, tooltip=_tooltip_t("gm")),
    ).properties(width=WIDTH, height=HEIGHT)  # fmt: skip
    seeds = data.points["seed"].nunique()
    range_of = f"the band spans the {seeds} seeds" if seeds > 1 else "one seed, so no band"
    table = data.points.groupby(["group", "t"], sort=False)["gm"].agg(["mean", "min", "max", "count"])
    return Figure(
        "over_time",
        "GM over time",
        f"Higher is better; lines are means over seeds, {range_of}. References are black or dark grey.",
        chart,
        ("points",),
        table.reset_index(),
    )


def matrix(data: Data) -> Figure:
    """Accuracy per dataset and t of one trajectory, chosen in a drop-down."""
    trajectories = list(dict.fromkeys(data.scores["trajectory"]))
    if not trajectories:
        raise NoData("no dataset has been scored")
    chosen = alt.param(
        name="chosen", value=data.best, bind=alt.binding_select(options=trajectories, name="Trajectory ")
    )
    base = _named("scores").transform_filter("datum.trajectory == chosen").encode(
        alt.X("t:O", title="t (tasks seen)", axis=alt.Axis(labelAngle=0)),
        alt.Y("dataset:N", title=None, sort=list(data.datasets), axis=alt.Axis(labelLimit=220)),
        tooltip=["dataset:N", "role:N", "zero_shot:N", "t:O", alt.Tooltip("score:Q", format=".3f")],
    )  # fmt: skip
    colour = alt.Color(
        "score:Q",
        title="Accuracy (fraction)",
        scale=alt.Scale(scheme="blues", domain=[0, 1]),
    )
    text = alt.condition("datum.score > 0.55", alt.value("white"), alt.value("black"))
    chart = alt.layer(
        base.mark_rect(stroke="white").encode(color=colour),
        base.mark_text(fontSize=11).encode(text=alt.Text("score:Q", format=".2f"), color=text),
    ).add_params(chosen).properties(width=WIDTH, height=alt.Step(24))  # fmt: skip
    return Figure(
        "matrix",
        "Accuracy per dataset over time",
        "Darker is better. Rows are the tasks in the order of the study, then the held-out sets, replayed ones first; a row that pales to the right is being forgotten.",
        chart,
        ("scores",),
        data.scores,
    )


def techniques(data: Data) -> Figure:
    """Technique x (init, deploy): mean GM."""
    rows = data.last[~data.last["reference"]]
    cells = rows.groupby(["technique", "strategy"], sort=False)["gm"].mean().reset_index()
    if len(cells) < 2:
        raise NoData("one combination of technique and strategy only")
    middle = (cells["gm"].min() + cells["gm"].max()) / 2
    base = _named("last").transform_filter(_kept(seed=False)).transform_filter("!datum.reference").transform_aggregate(
        gm="mean(gm)", groups="count()", groupby=["technique", "strategy"]
    ).encode(
        alt.X("strategy:N", title="init → deploy", sort=None, axis=alt.Axis(labelAngle=-30, labelLimit=160)),
        alt.Y("technique:N", title="Technique", sort=None, axis=alt.Axis(labelLimit=220)),
        tooltip=["technique:N", "strategy:N", alt.Tooltip("gm:Q", title="mean GM", format=".3f"), "groups:Q"],
    )  # fmt: skip
    text = alt.condition(f"datum.gm < {middle:.4f}", alt.value("white"), alt.value("black"))
    colour = alt.Color("gm:Q", title="Mean GM", scale=alt.Scale(scheme="viridis", zero=False))
    chart = alt.layer(
        base.mark_rect(stroke="white").encode(color=colour),
        base.mark_text(fontSize=11).encode(text=alt.Text("gm:Q", format=".3f"), color=text),
    ).properties(width=WIDTH, height=alt.Step(30))  # fmt: skip
    return Figure(
        "techniques",
        "Technique by strategy",
        "Brighter is better: GM at the last t (fraction), mean over all groups of a cell that the filters leave; - merges nothing. "
        "Columns that differ more than rows say that the strategy matters more than the technique.",
        chart,
        ("last",),
        cells,
    )


def spread(data: Data) -> Figure:
    """How far strategies lie apart beside how far techniques do."""
    rows = analysis.spread(data.last[~data.last["joint"]])
    rows = rows[rows["range"].notna()]
    if rows.empty:
        raise NoData("no technique ran under two strategies, and no strategy with two techniques")
    x = alt.X("range:Q", title="Mean range of GM (largest - smallest, fraction)")
    y = alt.Y("over:N", title=None, sort=None)
    tooltip = ["over:N", alt.Tooltip("range:Q", format=".4f"), alt.Tooltip("sd:Q", format=".4f"), "lines:Q"]
    base = _named("spread").encode(x, y, tooltip=tooltip)
    chart = alt.layer(
        base.mark_bar(color=COLOURS[0], height=18),
        base.mark_text(align="left", dx=4).encode(text=alt.Text("range:Q", format=".3f")),
    ).properties(width=WIDTH, height=alt.Step(34))  # fmt: skip
    return Figure(
        "spread",
        "What matters: the strategy or the technique",
        "The longer bar is the choice that changes GM more: strategies with the technique held fixed, techniques with the strategy held fixed. "
        + "; ".join(f"{row.over}: mean of {row.lines} comparisons" for row in rows.itertuples())
        + ".",
        chart,
        ("spread",),
        rows,
    )


def scaling(data: Data, column: str, what: str, unit: str) -> Figure:
    """GM at the last t over budget or horizon (`column`), one line per strategy."""
    rows = data.last[~data.last["reference"]]
    lines = rows.groupby(["name", column], sort=False)["gm"].mean().reset_index()
    several = lines[lines.groupby("name")[column].transform("nunique") > 1]
    if several.empty:
        only = rows[column].nunique()
        raise NoData(f"one {what} only" if only < 2 else f"no strategy ran with two values of the {what}")
    best = several.groupby("name")["gm"].max().nlargest(len(COLOURS)).index
    lines = several.assign(shown=several["name"].where(several["name"].isin(best), OTHER))
    base = _named(f"scaling_{column}").encode(
        alt.X(f"{column}:Q", title=f"{what.capitalize()} ({unit})", scale=alt.Scale(zero=False), axis=alt.Axis(values=sorted(int(v) for v in lines[column].unique()))),
        alt.Y("gm:Q", title="GM at the last t (fraction)", scale=alt.Scale(zero=False)),
        detail="name:N",
        tooltip=["name:N", f"{column}:Q", alt.Tooltip("gm:Q", format=".3f")],
    )  # fmt: skip
    colour = alt.Color("shown:N", title="Strategy", scale=_scale(list(best)), legend=LEGEND)
    chart = _layers(
        lines["shown"],
        base.transform_filter(_is(OTHER)).mark_line(color=GREY, opacity=0.5, strokeWidth=1),
        base.transform_filter(_is_not(OTHER)).mark_line(point=True, strokeWidth=2).encode(color=colour),
    ).properties(width=WIDTH, height=300)  # fmt: skip
    return Figure(
        f"scaling_{column}",
        f"Scaling with the {what}",
        "A rising line gains from more; lines that cross say that the best choice depends on it. Means over seeds and all other axes.",
        chart,
        (f"scaling_{column}",),
        lines,
    )


def transfer(data: Data) -> Figure:
    """Forgetting against backward transfer at the last t."""
    rows = data.last[data.last["forgetting"].notna() & data.last["bwt"].notna()]
    if rows.empty:
        raise NoData("forgetting needs two tasks seen, each scored from its arrival on")
    base = _named("last").transform_filter(_kept(seed=False)).transform_filter("isValid(datum.forgetting) && isValid(datum.bwt)").encode(
        alt.X("forgetting:Q", title="Forgetting (best so far - now, fraction)"),
        alt.Y("bwt:Q", title="Backward transfer (now - on arrival, fraction)"),
        tooltip=["group:N", alt.Tooltip("forgetting:Q", format=".3f"), alt.Tooltip("bwt:Q", format=".3f")],
    )  # fmt: skip
    chart = _layers(
        rows["shown"],
        base.transform_filter(_is(OTHER)).mark_circle(color=GREY, size=60, opacity=0.7),
        base.transform_filter(_is_not(OTHER)).mark_circle(size=110, opacity=0.9).encode(color=_colour(data, references=True)),
    ).properties(width=WIDTH, height=300)  # fmt: skip
    return Figure(
        "transfer",
        "Forgetting and backward transfer",
        "Up and to the left is better: little of the earlier tasks is lost, and later tasks help them. At the last t, mean over seeds.",
        chart,
        ("last",),
        rows[["group", "t", "seeds", "forgetting", "bwt"]],
    )


def sharing(summary: Mapping[str, Any]) -> Figure:
    """What the study does beside what its trajectories one by one would: `summary` is a plan's."""
    names = {"train": "Experts trained", "merge": "Merges", "evaluate": "Evaluations"}
    rows = [(name, summary["steps"][kind]["unique"], summary["steps"][kind]["naive"]) for kind, name in names.items()]  # fmt: skip
    rows.append(("Training (GFLOPs)", summary["gflops"], summary["gflops_naive"]))
    table = pd.DataFrame(
        [row for row in rows if row[1] is not None and row[2]], columns=["what", "shared", "alone"]
    )
    if table.empty:
        raise NoData("nothing was trained, merged or scored")
    table["share"] = table["shared"] / table["alone"]
    table["text"] = [f"{a:,.0f} of {b:,.0f} ({a / b:.0%})" for a, b in zip(table["shared"], table["alone"])]
    base = _named("sharing").encode(alt.Y("what:N", title=None, sort=None, axis=alt.Axis(labelLimit=200)))
    x = alt.X("share:Q", title="Share of what all trajectories one by one would take", axis=alt.Axis(format="%"), scale=alt.Scale(domain=[0, 1]))  # fmt: skip
    chart = alt.layer(
        base.mark_bar(color="#ececec", height=22).encode(x=alt.datum(0), x2=alt.datum(1)),
        base.mark_bar(color=COLOURS[0], height=8, yOffset=7).encode(x),
        base.mark_text(align="left", dx=6, dy=-4).encode(x=alt.datum(0), text="text:N"),
    ).properties(width=WIDTH, height=alt.Step(36))  # fmt: skip
    return Figure(
        "sharing",
        "What it cost, and what was shared",
        "Shorter is better: steps that several trajectories have in common are done once.",
        chart,
        ("sharing",),
        table[["what", "shared", "alone", "share", "text"]],
    )


def similarity(pairs: pd.DataFrame | None) -> Figure:
    """Cosine and sign conflict of the task vectors of experts; `pairs` has part, one, other, cosine and conflict."""
    if pairs is None or pairs["cosine"].isna().all():
        raise NoData("the best strategy has fewer than two experts with weights in the store")
    order, parts = list(dict.fromkeys(pairs["one"])), list(dict.fromkeys(pairs["part"]))
    chosen = alt.param(name="part", value=parts[0], bind=alt.binding_select(options=parts, name="Part "))
    base = _named("similarity").transform_filter("datum.part == part").encode(
        alt.X("other:N", title=None, sort=order, axis=alt.Axis(labelAngle=-30, labelLimit=140)),
        alt.Y("one:N", title=None, sort=order, axis=alt.Axis(labelLimit=180)),
        tooltip=["one:N", "other:N", alt.Tooltip("cosine:Q", format=".3f"), alt.Tooltip("conflict:Q", title="sign conflict", format=".3f")],
    )  # fmt: skip
    text = alt.condition("abs(datum.cosine) > 0.6", alt.value("white"), alt.value("black"))
    colour = alt.Color(
        "cosine:Q",
        title="Cosine",
        scale=alt.Scale(scheme="blueorange", domain=[-1, 1], reverse=True),
    )
    chart = alt.layer(
        base.mark_rect(stroke="white").encode(color=colour),
        base.mark_text(fontSize=11).encode(text=alt.Text("cosine:Q", format=".2f"), color=text),
    ).add_params(chosen).properties(width=480, height=alt.Step(30))  # fmt: skip
    return Figure(
        "similarity",
        "How alike the experts are",
        "Cosine of task vectors (expert - base) of the advised strategy's experts: 0 is unrelated, below it two experts undo each other. "
        f"Hover for the share of clearly moved weights whose signs differ (unrelated: one half). {_clashes(pairs, parts[0])}",
        chart,
        ("similarity",),
        pairs,
    )


def _clashes(pairs: pd.DataFrame, part: str) -> str:
    """Which merges are likely to clash, in a sentence."""
    whole = pairs[(pairs["part"] == part) & (pairs["one"] < pairs["other"])]
    bad = whole[(whole["cosine"] < CLASH_COSINE) | (whole["conflict"] > CLASH_CONFLICT)].nsmallest(
        3, "cosine"
    )
    if bad.empty:
        return "No two of them clash."
    named = ", ".join(f"{one} and {other}" for one, other in zip(bad["one"], bad["other"]))
    return f"Merging these is likely to clash: {named}."


def _named(name: str) -> Any:
    return alt.Chart(alt.NamedData(name))


def _layers(shown: pd.Series, others: Any, *layers: Any) -> Any:
    """The grey layer lies below, and only if there is something grey."""
    return alt.layer(*([others] if (shown == OTHER).any() else []), *layers)


def _over_time(*metrics: str) -> Any:
    """Means over seeds, and the range of each metric, of what the filters leave."""
    found: dict[str, str] = {}
    for metric in metrics:
        found |= {
            metric: f"mean({metric})",
            f"{metric}_low": f"min({metric})",
            f"{metric}_high": f"max({metric})",
        }
    groups = ["group", "t", "shown", "reference"]
    return _named("points").transform_filter(_kept()).transform_aggregate(**found, groupby=groups)


def _kept(seed: bool = True) -> str:
    """References stay whatever is filtered, to compare with."""
    axes = [axis for axis in AXES if seed or axis != "seed"]
    chosen = " && ".join(f"(only_{axis} == 'all' || toString(datum.{axis}) == only_{axis})" for axis in axes)
    return f"datum.reference || ({chosen})"


def _is(group: str) -> str:
    return f"datum.shown == '{group}'"


def _is_not(group: str) -> str:
    return f"datum.shown != '{group}'"


def _scale(groups: list[str], references: tuple[str, ...] = ()) -> Any:
    greys = [BLACK, "#666666", "#333333", "#888888"]
    colours = [*COLOURS[: len(groups)], *(greys[i % len(greys)] for i in range(len(references)))]
    return alt.Scale(domain=[*groups, *references], range=colours)


def _colour(data: Data, references: bool = False) -> Any:
    rows = data.last[data.last["shown"] != OTHER].sort_values("gm", ascending=False, kind="stable")
    groups = rows.loc[~rows["reference"], "group"].tolist()
    also = tuple(rows.loc[rows["reference"], "group"]) if references else ()
    return alt.Color(
        "shown:N", title="Best by GM", scale=_scale(groups, also), legend=alt.Legend(labelLimit=340)
    )


def _tooltip() -> list[Any]:
    return _tooltip_t("ka", "zs", "gm", *OF_GROUPS)


def _tooltip_t(*metrics: str) -> list[Any]:
    return ["group:N", "t:O", *(alt.Tooltip(f"{metric}:Q", format=".3f") for metric in metrics)]
