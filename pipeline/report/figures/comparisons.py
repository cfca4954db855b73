"""Figures of the effect of a choice: strategy or technique, forgetting against transfer, GM against cost, savings by sharing."""

from collections.abc import Mapping
from typing import Any

import altair as alt
import pandas as pd

from pipeline.report import analysis
from pipeline.report.data import Data, NoData
from pipeline.report.style import (
    BLACK,
    COLOURS,
    GREY,
    OTHER,
    Figure,
    colour_of,
    is_,
    is_not,
    layers,
    named,
    sized,
    tooltip,
)

PRICES = {
    "gflops": ("GFLOPs", "GFLOPs of training"),
    "seconds": ("seconds", "Seconds of training and merging"),
}


def spread(data: Data) -> Figure:
    """The spread of strategies beside the spread of techniques."""
    rows = analysis.spread(data.last[~data.last["reference"]])
    rows = rows[rows["range"].notna()]
    if rows.empty:
        raise NoData(
            "no setting has both a technique under two strategies and a strategy with two techniques, all else equal"
        )
    tooltips = ["over:N", alt.Tooltip("range:Q", format=".4f"), alt.Tooltip("sd:Q", format=".4f"), "lines:Q"]
    base = named("spread").encode(
        alt.X("range:Q", title="Mean range of GM (largest - smallest, fraction)"),
        alt.Y("over:N", title=None, sort=None),
        tooltip=tooltips,
    )
    chart = alt.layer(
        base.mark_bar(color=COLOURS[0], height=18),
        base.mark_text(align="left", dx=4).encode(text=alt.Text("range:Q", format=".3f")),
    )
    return Figure(
        "spread",
        "What matters: the strategy or the technique",
        "The longer bar is the choice that changes GM more: strategies with the technique held fixed, techniques with the strategy held fixed, all else equal; "
        + "; ".join(f"{row.over}: mean of {row.lines} comparisons" for row in rows.itertuples())
        + ". Of the whole report, whatever is filtered.",
        sized(chart, alt.Step(34)),
        ("spread",),
        rows,
    )


def transfer(data: Data) -> Figure:
    """Forgetting against backward transfer at the last t."""
    rows = data.last[data.last["forgetting"].notna() & data.last["bwt"].notna()]
    if rows.empty:
        raise NoData("forgetting needs two tasks seen, each scored from its arrival on")
    base = named("last").transform_filter("isValid(datum.forgetting) && isValid(datum.bwt)").encode(
        alt.X("forgetting:Q", title="Forgetting (best so far - now, fraction)", axis=alt.Axis(tickCount=8)),
        alt.Y("bwt:Q", title="Backward transfer (now - on arrival, fraction)"),
        tooltip=tooltip("forgetting", "bwt", first=("group:N", "settings:N")),
    )  # fmt: skip
    chart = layers(
        rows["shown"],
        base.transform_filter(is_(OTHER)).mark_circle(color=GREY, size=60, opacity=1),
        base.transform_filter(is_not(OTHER)).mark_circle(size=110, opacity=1).encode(color=colour_of(data.last, references=True)),
    )  # fmt: skip
    return Figure(
        "transfer",
        "Forgetting and backward transfer",
        "Up and to the left is better: little of the earlier tasks is lost, and later tasks help them. At the last t, mean over seeds.",
        sized(chart, 300),
        ("last",),
        rows[["group", "t", "seeds", "forgetting", "bwt"]],
    )


_AMOUNT = "format(datum.value, datum.value < 10000 ? ',.4~r' : '~s')"
"""Whole numbers as people write them; only large ones get a k or an M."""


def price(data: Data, cost: str) -> Figure:
    """GM at the last t against the cost of a trajectory that is run alone, with the Pareto front."""
    unit, title = PRICES[cost]
    rows = data.last[data.last[cost].notna() & ~data.last["joint"]]
    if rows[cost].nunique() < 2:
        raise NoData(f"the {unit} of a sample were not measured" if cost == "gflops" and rows.empty else f"no two groups differ in {unit} that were measured")  # fmt: skip
    base = named("last").transform_filter(f"isValid(datum.{cost}) && !datum.joint").encode(
        alt.X(f"{cost}:Q", title=f"{title}, if the trajectory were run alone", axis=alt.Axis(labelExpr=_AMOUNT, tickCount=8)),
        alt.Y("gm:Q", title="GM at the last t (fraction)", scale=alt.Scale(zero=False)),
        tooltip=["group:N", "settings:N", alt.Tooltip(f"{cost}:Q", format=",.0f"), alt.Tooltip("gm:Q", format=".3f")],
    )  # fmt: skip
    front = base.transform_filter(f"datum.front_{cost}")
    chart = layers(
        rows["shown"],
        base.transform_filter(is_(OTHER)).mark_circle(color=GREY, size=60, opacity=1),
        front.mark_line(color=BLACK, strokeDash=[4, 3], strokeWidth=1, interpolate="step-after").encode(
            order=f"{cost}:Q"
        ),
        base.transform_filter(is_not(OTHER))
        .mark_circle(size=110, opacity=1)
        .encode(color=colour_of(data.last, references=True)),
        front.mark_point(color=BLACK, size=190, strokeWidth=1.2, opacity=1),
    )
    return Figure(
        f"price_{cost}",
        f"GM against cost in {unit}",
        f"Up and to the left is better. Ringed dots on the dashed line are the Pareto front: nothing that is shown has more GM for as many {unit}. "
        "Steps that trajectories share count for each of them; the multitask reference is left out.",
        sized(chart, 300),
        ("last",),
        rows[["group", "seeds", cost, "gm", f"front_{cost}"]],
    )


def sharing(summary: Mapping[str, Any]) -> Figure:
    """The steps of the study beside those of its trajectories one by one: `summary` is a plan's."""
    names = {
        "train": "Experts trained",
        "measure": "Measurements",
        "learn": "Learned merges",
        "merge": "Merges",
        "evaluate": "Evaluations",
    }
    counted = {name: summary["steps"][kind] for kind, name in names.items() if kind in summary["steps"]}
    rows = [(name, one["unique"], one["naive"]) for name, one in counted.items()]
    seeing = {"Measurements": "measuring", "Learned merges": "learning"}
    words = ["Training", *(word for name, word in seeing.items() if name in counted)]
    rows.append(
        (
            f"{' and '.join(words)} (GFLOPs)",
            summary["gflops"],
            summary["gflops_naive"],
        )
    )
    table = pd.DataFrame(
        [row for row in rows if row[1] is not None and row[2]], columns=["what", "shared", "alone"]
    )
    if table.empty:
        raise NoData("nothing was trained, merged or scored")
    table["share"] = table["shared"] / table["alone"]
    table["text"] = [f"{a:,.0f} of {b:,.0f} ({a / b:.0%})" for a, b in zip(table["shared"], table["alone"])]
    base = named("sharing").encode(alt.Y("what:N", title=None, sort=None, axis=alt.Axis(labelLimit=200)))
    x = alt.X("share:Q", title="Share of what all trajectories one by one would take", axis=alt.Axis(format="%"), scale=alt.Scale(domain=[0, 1]))  # fmt: skip
    chart = alt.layer(
        base.mark_bar(color="#ececec", height=22).encode(x=alt.datum(0), x2=alt.datum(1)),
        base.mark_bar(color=COLOURS[0], height=8, yOffset=7).encode(x),
        base.mark_text(align="left", dx=6, dy=-4).encode(x=alt.datum(0), text="text:N"),
    )
    return Figure(
        "sharing",
        "What it cost, and what was shared",
        "Shorter is better: steps that several trajectories have in common are done once.",
        sized(chart, alt.Step(36)),
        ("sharing",),
        table[["what", "shared", "alone", "share", "text"]],
    )
