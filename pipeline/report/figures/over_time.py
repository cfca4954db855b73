"""Figures with a path or a line per group: over the plane of KA and ZS, over t, over the tasks, over training."""

import json

import altair as alt
import pandas as pd

from pipeline.report import analysis
from pipeline.report.data import Data, NoData
from pipeline.report.style import (
    BLACK,
    FAINT,
    OTHER,
    Figure,
    colour_of,
    is_,
    is_not,
    layers,
    legend_of,
    named,
    scale_of,
    sized,
    tooltip,
)
from pipeline.results.over_time import OF_GROUPS

METRICS = {
    "gm": ("GM", "GM of KA and ZS"),
    "ka": ("KA", "KA: mean score on the tasks"),
    "zs": ("ZS", "ZS: mean score on held-out sets"),
}
SAID = 4
"""Most groups of coincident lines that a sentence names."""


def plane(data: Data) -> Figure:
    """KA against ZS, one path per group over t."""
    paths = data.points[~data.points["joint"]]
    if paths.groupby("group")["t"].nunique().max() < 2:
        raise NoData("no group has been scored at two points in time")
    (left, right), (low, high) = (_bounds(data.points[metric]) for metric in ("ka", "zs"))
    x = alt.X("ka:Q", title="KA: mean score on the tasks (fraction)", scale=alt.Scale(domain=[left, right], nice=False), axis=alt.Axis(tickCount=8))  # fmt: skip
    y = alt.Y("zs:Q", title="ZS: mean score on held-out sets (fraction)", scale=alt.Scale(domain=[low, high], nice=False))  # fmt: skip
    moved = _means("ka", "zs").transform_filter("!datum.reference").encode(x, y, order="t:O")
    coloured = moved.transform_filter(is_not(OTHER)).encode(color=colour_of(data.last), detail="group:N")
    final = named("last").encode(
        x, y, tooltip=tooltip("ka", "zs", "gm", *OF_GROUPS, first=("group:N", "settings:N", "t:O"))
    )
    known = final.transform_filter("datum.reference")
    ends = final.transform_filter(f"!datum.reference && {is_not(OTHER)}")
    start = moved.transform_filter("datum.t == 0").transform_aggregate(groupby=["ka", "zs"]).encode(x, y)
    references = [
        known.mark_point(filled=True, color=BLACK, size=90, shape="diamond", opacity=1),
        known.mark_text(dy=-14, fontSize=11).encode(text="group:N"),
    ] if data.last["reference"].any() else []  # fmt: skip
    chart = layers(
        data.last["shown"],
        moved.transform_filter(is_(OTHER)).mark_line(**FAINT).encode(detail="group:N", tooltip=["group:N", "t:O"]),
        coloured.mark_line(point={"size": 22}, strokeWidth=2).encode(tooltip=tooltip("ka", "zs")),
        _arrows(coloured, right - left, high - low),
        start.mark_point(shape="square", color=BLACK, size=190, strokeWidth=1.2, filled=False, opacity=1),
        final.transform_filter("datum.front").mark_line(color=BLACK, strokeDash=[4, 3], strokeWidth=1).encode(order="ka:Q"),
        ends.mark_point(filled=True, size=130, opacity=1, stroke="white", strokeWidth=1).encode(color=colour_of(data.last)),
        final.transform_filter("datum.front").mark_point(color=BLACK, size=190, strokeWidth=1.2, opacity=1),
        *references,
    )  # fmt: skip
    return Figure(
        "plane",
        "Knowledge accumulation against zero-shot retention",
        "Up and to the right is better. A path begins at the square (the base, t = 0), an arrow on it points to the next task, and its large dot is the "
        "last t; mean over seeds. Diamonds are references. Ringed dots on the dashed line are the Pareto front: nothing that is shown is better in both."
        + _coincident(data, ("ka", "zs")),
        sized(chart),
        ("points", "last"),
        data.last[["group", "t", "seeds", "ka", "zs", "gm", "front", "reference", *OF_GROUPS]],
    )


def over_time(data: Data, metric: str = "gm") -> Figure:
    """One metric over t, with the range of the seeds."""
    if data.points["t"].nunique() < 2:
        raise NoData("one point in time only")
    name, title = METRICS[metric]
    x = alt.X("t:Q", title="t (tasks seen)", axis=alt.Axis(tickMinStep=1, format="d"))
    scale = alt.Scale(zero=False)
    base = _means(metric).encode(x)
    y = alt.Y(f"{metric}:Q", title=f"{title} (fraction)", scale=scale)
    plain, colour = base.transform_filter(is_not(OTHER)).encode(detail="group:N"), colour_of(data.last, True)
    known = plain.encode(color=colour)
    fills = json.dumps(dict(zip(colour["scale"]["domain"], colour["scale"]["range"])))
    band = plain.transform_calculate(fill=f"({fills})[datum.shown]").mark_area(opacity=1, fillOpacity=0.15).encode(
        alt.Y(f"{metric}_low:Q", scale=scale, title=f"{title} (fraction)"),
        alt.Y2(f"{metric}_high:Q"),
        alt.Fill("fill:N", scale=None),  # a separate fill: the legend would else take the pale colours of the bands
    )  # fmt: skip
    chart = layers(
        data.last["shown"],
        base.transform_filter(is_(OTHER)).mark_line(**FAINT).encode(y, detail="group:N", tooltip=["group:N", "t:O"]),
        band,
        known.mark_line(strokeWidth=2).encode(y),
        known.mark_point(filled=True, size=30, opacity=1).encode(y, tooltip=tooltip(metric)),
    )  # fmt: skip
    seeds = data.points["seed"].nunique()
    range_of = f"the band spans the {seeds} seeds" if seeds > 1 else "one seed, so no band"
    table = data.points.groupby(["group", "t"], sort=False)[metric].agg(["mean", "min", "max", "count"])
    return Figure(
        "over_time" if metric == "gm" else f"{metric}_over_time",
        f"{name} over time",
        f"Higher is better; lines are means over seeds, {range_of}. References are black or dark grey."
        + _coincident(data, (metric,)),
        sized(chart),
        ("points",),
        table.reset_index(),
    )


def forgetting(data: Data) -> Figure:
    """The forgetting of each group and task at its last t."""
    rows = analysis.forgotten(data.scores, data.points)
    if rows.empty:
        raise NoData("forgetting of a task needs whole datasets and a later task")
    rows = rows.merge(data.last[["group", "shown", "reference"]], on="group").sort_values("arrival", kind="stable")  # fmt: skip
    base = named("forgetting").transform_aggregate(
        forgetting="mean(forgetting)", arrival="mean(arrival)", groupby=["group", "task", "shown"]
    ).encode(
        alt.X("task:N", title="Task, in order of arrival", sort=list(dict.fromkeys(rows["task"])), axis=alt.Axis(labelAngle=-30, labelLimit=140)),
        alt.Y("forgetting:Q", title="Forgetting at the last t (fraction)"),
        detail="group:N",
        tooltip=["group:N", "task:N", alt.Tooltip("arrival:Q", title="arrives at t"), alt.Tooltip("forgetting:Q", format=".3f")],
    )  # fmt: skip
    known = base.transform_filter(is_not(OTHER)).encode(color=colour_of(data.last, references=True))
    chart = layers(
        data.last["shown"],
        base.transform_filter(is_(OTHER)).mark_line(**FAINT),
        known.mark_line(strokeWidth=1.5, strokeOpacity=0.6),
        known.mark_point(filled=True, size=60, opacity=1),
    )
    return Figure(
        "forgetting",
        "Forgetting per task",
        "Lower is better: how far a task's score at the last t lies below its best at any earlier t, mean over seeds. The last task is left out; the mean "
        "over the others is the forgetting of the table. Dots are joined for the eye only.",
        sized(chart, 300),
        ("forgetting",),
        rows,
    )


def training(rows: pd.DataFrame, data: Data) -> Figure:
    """Training loss over the stream: `rows` has `trajectory`, `t`, `task`, `place` (in tasks) and `loss`."""
    if rows.empty:
        raise NoData("no expert with a training curve is in the store")
    groups = data.points.drop_duplicates("trajectory").set_index("trajectory")[["group", "shown"]]
    rows = rows.join(groups, on="trajectory", how="inner")
    base = named("training").encode(
        alt.X("place:Q", title="Tasks trained (each from its first to its last step)", axis=alt.Axis(tickMinStep=1, format="d")),
        alt.Y("loss:Q", title="Training loss", scale=alt.Scale(zero=False)),
        alt.Detail(["group:N", "t:O"]),
        color=colour_of(data.last[~data.last["reference"] | data.last["group"].isin(rows["group"])], references=True),
        tooltip=["group:N", "t:O", "task:N", alt.Tooltip("loss:Q", format=".3f")],
    )  # fmt: skip
    return Figure(
        "training",
        "Training curves",
        "The loss of every expert of the best groups and references, their first seed, one task after the other. A batch with replayed samples is another "
        "batch, so compare curves of equal mixture only. An expert that several groups share is one line, in the colour of one of them.",
        sized(base.mark_line(strokeWidth=1.5), 300),
        ("training",),
        rows[["group", "shown", "trajectory", "t", "task", "place", "loss"]],
    )


def scaling(data: Data, column: str, what: str, unit: str) -> Figure:
    """GM at the last t over budget or horizon (`column`), one line per setting of everything else."""
    line, field = f"{what}_line", f"{what}_shown"
    several = data.last[data.last[field].notna()]
    if several.empty:
        only = data.last.loc[~data.last["reference"], column].nunique() < 2
        alone = f"no two groups differ in the {what} and in nothing else, so it cannot be compared"
        raise NoData(f"one {what} only" if only else alone)
    best = several.loc[several[field] != OTHER].sort_values("gm", ascending=False)[line].drop_duplicates()
    base = named("last").transform_filter(f"isValid(datum.{field})").encode(
        alt.X(f"{column}:Q", title=f"{what.capitalize()} ({unit})", scale=alt.Scale(zero=False), axis=alt.Axis(values=sorted(int(v) for v in several[column].unique()))),
        alt.Y("gm:Q", title="GM at the last t (fraction)", scale=alt.Scale(zero=False)),
        detail=f"{line}:N",
        tooltip=["group:N", f"{column}:Q", alt.Tooltip("gm:Q", format=".3f")],
    )  # fmt: skip
    colour = alt.Color(
        f"{field}:N",
        title="Everything else",
        scale=scale_of(list(best)),
        legend=legend_of(list(best)),
    )
    chart = layers(
        data.last[field],
        base.transform_filter(f"datum.{field} == '{OTHER}'").mark_line(**FAINT),
        base.transform_filter(f"datum.{field} != '{OTHER}'").mark_line(point=True, strokeWidth=2).encode(color=colour),
    )  # fmt: skip
    return Figure(
        f"scaling_{column}",
        f"Scaling with the {what}",
        f"A rising line gains from more; lines that cross say that the best choice depends on it. The groups of a line differ in the {what} alone. "
        "Means over seeds.",
        sized(chart, 300),
        ("last",),
        several[["group", line, column, "gm", "seeds"]],
    )


def _means(*metrics: str) -> alt.Chart:
    """Means over seeds, and the range of each metric."""
    found: dict[str, str] = {}
    for metric in metrics:
        found |= {
            metric: f"mean({metric})",
            f"{metric}_low": f"min({metric})",
            f"{metric}_high": f"max({metric})",
        }
    return named("points").transform_aggregate(**found, groupby=["group", "t", "shown", "reference"])


def _arrows(paths: alt.Chart, width: float, height: float) -> alt.Chart:
    """An arrow head in the middle of each step of a path that is long enough; `width` and `height` are those of the domains."""
    across, up = f"(datum.next_ka - datum.ka) / {width:.6f} * width", f"(datum.next_zs - datum.zs) / {height:.6f} * height"  # fmt: skip
    return (
        paths.transform_window(next_ka="lead(ka)", next_zs="lead(zs)", groupby=["group"], sort=[{"field": "t"}])
        .transform_filter("isValid(datum.next_ka)")
        .transform_calculate(across=across, up=up)
        .transform_filter("sqrt(datum.across * datum.across + datum.up * datum.up) > 16")
        .transform_calculate(
            angle="atan2(datum.across, datum.up) * 180 / PI",
            ka="(datum.ka + datum.next_ka) / 2",
            zs="(datum.zs + datum.next_zs) / 2",
        )
        .mark_point(shape="triangle", filled=True, size=70, opacity=1)
        .encode(angle=alt.Angle("angle:Q", scale=None))
    )  # fmt: skip


def _bounds(values: pd.Series) -> tuple[float, float]:
    """The domain of an axis: all values with room for marks."""
    low, high = float(values.min()), float(values.max())
    room = 0.07 * (high - low) or 0.01
    return round(low - room, 4), round(high + room, 4)


def _coincident(data: Data, metrics: tuple[str, ...]) -> str:
    """A sentence that names coloured lines that coincide."""
    points = data.points[data.points["shown"] != OTHER]
    found = analysis.coincident(points, metrics)
    if not found:
        return ""
    told = "; ".join(" and ".join(groups) for groups in found[:SAID])
    more = f"; and {len(found) - SAID} more" if len(found) > SAID else ""
    return f" Equal at every t, so that one line hides the others: {told}{more}."
