"""The figures of the study, from kept numbers. SVG, drawn offline.

Invariant: a figure shows means over replicates with their 95 % intervals or every replicate beside them.
"""

from typing import Any

import altair as alt
import pandas as pd

from pipeline.claims.when_ema import measures
from pipeline.claims.when_ema.measures import EE, EL, FT, LE
from pipeline.claims.when_ema.numbers import Numbers
from pipeline.report import style as report
from pipeline.report.analysis import half_width
from pipeline.report.page import svg_of

WIDTH, HEIGHT = 420, 260
HUES = dict(zip((FT, LE, EL, EE), report.COLOURS, strict=False))
RATE = "learning rate"
SHARE = "share of replay"
LEGEND = alt.Legend(symbolOpacity=1, symbolStrokeWidth=3, labelLimit=200)


def draw_all(core: Numbers) -> dict[str, str]:
    """Figure name -> SVG."""
    ends = measures.endpoints(core)
    charts = {
        "map": gain_map(ends, core),
        "shares": over_shares(ends),
        "weights": weight_map(ends, core),
        "why": why(ends, core),
    }
    return {name: svg_of(chart.to_dict()) for name, chart in charts.items()}


def summary(rows: pd.DataFrame, value: str, by: list[str]) -> pd.DataFrame:
    """`by`, mean, `low` and `high` of the 95 % interval over replicates (both the mean for a single one), and `half`."""
    grouped = rows.groupby(by, sort=False)[value]
    found = grouped.agg(["mean", "std", "count"]).reset_index()
    found["half"] = [half_width(sd, n) for sd, n in zip(found["std"], found["count"], strict=True)]
    wide = found["half"].fillna(0.0)
    return found.assign(low=found["mean"] - wide, high=found["mean"] + wide)


def gain_map(ends: pd.DataFrame, core: Numbers) -> Any:
    """Gain of Best-in-TIME at each share and rate, with the mean drift at the rate; pale if the interval holds 0 or is missing."""
    rows = measures.with_drift(measures.gains(measures.chosen(ends, ["lr"]), by=["lr"]), core)
    rows["drift"] = rows.groupby("lr")["drift"].transform("mean")
    table = summary(rows, "gain", ["share", "lr", "drift"])
    table["row"] = [
        f"{lr:g} (drift {drift:.3f})" for lr, drift in zip(table["lr"], table["drift"], strict=True)
    ]
    table["text"] = [_interval(mean, half) for mean, half in zip(table["mean"], table["half"], strict=True)]
    table["sure"] = (table["mean"].abs() > table["half"]) & table["half"].notna()
    reach = float(table["mean"].abs().max()) or 1.0
    order = list(table.sort_values("lr", ascending=False)["row"].unique())
    x = alt.X("share:O", title=SHARE, axis=alt.Axis(labelAngle=0))
    y = alt.Y("row:N", title=RATE, sort=order, axis=alt.Axis(labelLimit=200))
    scale = alt.Scale(scheme="blueorange", domain=[-reach, reach], domainMid=0)
    heat = alt.Chart(table).mark_rect().encode(
        x, y, alt.Color("mean:Q", title="gain in GM", scale=scale),
        opacity=alt.condition("datum.sure", alt.value(1.0), alt.value(0.35)),
    )  # fmt: skip
    text = alt.Chart(table).mark_text(fontSize=10).encode(x, y, text="text:N")
    return alt.layer(heat, text).properties(width=560, height=130)


def over_shares(ends: pd.DataFrame) -> Any:
    """The gain of each arm over fine-tuning, all tuned on `val`, by share; thin lines are replicates of Best-in-TIME."""
    picks = measures.chosen(ends)
    rows = pd.concat([measures.gains(picks, arm=arm).assign(arm=arm) for arm in (LE, EL, EE)])
    colour = alt.Color(
        "arm:N",
        title=None,
        legend=LEGEND,
        scale=alt.Scale(domain=[LE, EL, EE], range=[HUES[arm] for arm in (LE, EL, EE)]),
    )
    x = alt.X("share:Q", title=SHARE)
    title = "mean test GM over the stream, less fine-tuning's"
    mean = summary(rows, "gain", ["arm", "share"])
    thin = (
        alt.Chart(rows[rows["arm"] == EE])
        .mark_line(opacity=0.35, strokeWidth=1)
        .encode(x, alt.Y("gain:Q", title=title), colour, detail="replicate:N")
    )
    band = alt.Chart(mean).mark_errorbar().encode(x, alt.Y("low:Q", title=title), alt.Y2("high:Q"), colour)
    thick = (
        alt.Chart(mean).mark_line(strokeWidth=2.5, point=True).encode(x, alt.Y("mean:Q", title=title), colour)
    )
    zero = alt.Chart(pd.DataFrame({"y": [0.0]})).mark_rule(strokeDash=[4, 3]).encode(y="y:Q")
    return alt.layer(zero, thin, band, thick).properties(width=WIDTH, height=HEIGHT)


def weight_map(ends: pd.DataFrame, core: Numbers) -> Any:
    """The best weight of Best-in-TIME on `val`, mean over replicates, by drift; 1 is fine-tuning."""
    rows = measures.with_drift(measures.best_weights(ends), core)
    table = summary(rows, "best", ["share", "lr"]).merge(
        rows.groupby(["share", "lr"])["drift"].mean().reset_index(), on=["share", "lr"]
    )
    table["share of replay"] = table["share"].map(lambda share: f"{share:g}")
    x = alt.X(
        "drift:Q",
        title="drift of a task (length of its task vector over that of the weights it began with)",
        scale=alt.Scale(type="log", nice=False, padding=12),
    )
    y = alt.Y("mean:Q", title="best weight of the new expert", scale=alt.Scale(domain=[0, 1]))
    colour = alt.Color("share of replay:O", scale=alt.Scale(scheme="viridis"))
    lines = alt.Chart(table).mark_line(point=True).encode(x, y, colour)
    bars = (
        alt.Chart(table)
        .mark_errorbar()
        .encode(x, alt.Y("low:Q", title="best weight of the new expert"), alt.Y2("high:Q"), colour)
    )
    return alt.layer(bars, lines).properties(width=WIDTH, height=HEIGHT)


def why(ends: pd.DataFrame, core: Numbers) -> Any:
    """Gain at one rate against the forgetting that the middle of a task vector spares, a point per replicate."""
    rows = measures.with_drift(measures.gains(measures.chosen(ends, ["lr"]), by=["lr"]), core)
    rows = rows.merge(measures.curvatures(core), on=[*measures.UNIT, "lr"])
    rows["share of replay"] = rows["share"].map(lambda share: f"{share:g}")
    return (
        alt.Chart(rows)
        .mark_point(filled=True, opacity=0.7)
        .encode(
            alt.X("spared:Q", title="old loss at half the way, below the mean of both ends"),
            alt.Y("gain:Q", title="gain of Best-in-TIME in GM"),
            alt.Color("share of replay:O", scale=alt.Scale(scheme="viridis")),
            alt.Shape("lr:N", title=RATE),
        )
        .properties(width=WIDTH, height=HEIGHT)
    )


def _interval(mean: float, half: float) -> str:
    text = f"{mean:+.3f}"
    return text if half != half else f"{text} ± {half:.3f}"
