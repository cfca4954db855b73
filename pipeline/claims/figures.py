"""The figures of a reproduction: the final scores of the studies, and GM over time. SVG, drawn offline.

Invariant: a figure shows means over replicates and every replicate beside them; it includes everything that its claim names.
"""

from typing import Any

import altair as alt
import pandas as pd

from pipeline.claims import contrasts
from pipeline.claims.results import Findings, readable
from pipeline.claims.tuning import TUNING
from pipeline.report import style as report
from pipeline.report.page import svg_of

COLOURS = [*report.COLOURS, report.BLACK, "#888888", "#8C564B"]
NAMES = {
    "base/base": "zero-shot", "base/all": "offline merging", "base/ema": "base → ema", "latest/latest": "continual fine-tuning",
    "latest/all": "latest → all", "latest/ema": "latest → ema", "ema/latest": "ema → latest", "ema/all": "ema → all",
    "ema/ema": "Best-in-TIME (ema → ema)", "all/latest": "all → latest", "all/all": "all → all", "all/ema": "all → ema",
    "joint/joint": "multitask",
}  # fmt: skip
HUES = dict(zip(
    ("latest/latest", "base/all", "ema/ema", "latest/ema", "ema/latest", "latest/all", "joint/joint", "base/base", "ema/all", "base/ema"),
    COLOURS, strict=True,
))  # fmt: skip
"""Colours of the strategies that are drawn as lines, by init/deploy."""
SHOWN = ["latest/latest", "ema/ema", "latest/ema", "ema/latest", "latest/all", "base/all", "base/base"]
WIDTH, HEIGHT = 520, 300
GM = "GM of KA and ZS"
LEGEND = alt.Legend(labelLimit=240, symbolOpacity=1, symbolStrokeWidth=3)


def draw_all(found: Findings) -> dict[str, str]:
    """Figure name -> SVG."""
    budgets = pd.concat(
        [found.rows[found.rows["study"] == study] for study in (contrasts.BUDGETS, contrasts.MULTITASK)]
    )
    charts = {
        "over_time": over_time(found), "offline": offline(found), "cells": cells(found), "variance": variance(found),
        "budgets": grown(budgets, "multiplier", "budget (1 = 50 steps a task)", log=True),
        "sizes": grown(found.final(contrasts.SIZES), "model", "model, small to large"),
        "horizons": grown(found.final(contrasts.HORIZONS), "tasks", "tasks, same total budget"),
    }  # fmt: skip
    if found.has(TUNING[0]):
        charts["ema_weights"] = weights(found)
    return {name: svg_of(chart.to_dict()) for name, chart in charts.items()}


def over_time(found: Findings) -> Any:
    """GM after every task of the main strategies, averaged; one thin line per replicate, the mean on top."""
    rows = named(found.final(contrasts.CELLS, **contrasts.AVERAGED))
    rows = rows[rows["cell"].isin(SHOWN)]
    rows = (
        rows[["strategy", "cell", "replicate", "over_time"]]
        .assign(over_time=rows["over_time"].str.split())
        .explode("over_time")
    )
    rows = rows.assign(t=rows.groupby(["cell", "replicate"]).cumcount(), gm=rows["over_time"].astype(float))
    x = alt.X("t:O", title="tasks seen", axis=alt.Axis(labelAngle=0))
    y, colour = alt.Y("gm:Q", title=GM, scale=alt.Scale(zero=False)), _colour(rows)
    thin = alt.Chart(rows).mark_line(opacity=0.3, strokeWidth=1).encode(x, y, colour, detail="replicate:N")
    mean = rows.groupby(["strategy", "t"], as_index=False)["gm"].mean()
    thick = alt.Chart(mean).mark_line(strokeWidth=2.5).encode(x, y, colour)
    return _sized(alt.layer(thin, thick))


def offline(found: Findings) -> Any:
    """Offline techniques, best first, with uniform averaging, zero-shot and the replay baseline as rules."""
    rows = found.final(contrasts.OFFLINE, **contrasts.OFFLINE_CELL, replay=False)
    rows = rows.assign(
        what=(rows["technique"] + " " + rows["params"].map(readable)).str.replace(":", "").str.rstrip()
    )
    order = list(rows.groupby("what")["gm"].mean().sort_values(ascending=False).index)
    y = alt.Y("what:N", sort=order, title=None, axis=alt.Axis(labelLimit=330, labelFontSize=9))
    x = alt.X("gm:Q", title=GM, scale=alt.Scale(zero=False))
    means = rows.groupby("what", as_index=False)["gm"].mean()
    rule = pd.DataFrame(
        [
            {"gm": found.metric(contrasts.OFFLINE, **contrasts.BASELINE).mean(), "is": "continual fine-tuning with replay"},
            {"gm": found.metric(contrasts.OFFLINE, **contrasts.OFFLINE_CELL, replay=False, technique="average", params="{}").mean(), "is": "uniform average"},
            {"gm": found.metric(contrasts.NO_REPLAY, init="base", deploy="base").mean(), "is": "zero-shot"},
        ]
    )  # fmt: skip
    colour = alt.Color(
        "is:N",
        title=None,
        scale=alt.Scale(range=[HUES["latest/latest"], HUES["base/all"], report.BLACK]),
        legend=alt.Legend(orient="top", labelLimit=300),
    )
    return alt.layer(
        alt.Chart(rows).mark_point(size=18, color="#777777", filled=True).encode(x, y),
        alt.Chart(means).mark_tick(color="#000000", thickness=2).encode(x, y),
        alt.Chart(rule).mark_rule(strokeWidth=1.5, strokeDash=[5, 3]).encode(x="gm:Q", color=colour),
    ).properties(width=420, height=14 * len(order))  # fmt: skip


def cells(found: Findings) -> Any:
    """Technique x (init, deploy): mean final GM."""
    rows = named(found.final(contrasts.CELLS))
    rows = rows[rows["technique"] != "-"].groupby(["technique", "strategy"], as_index=False)["gm"].mean()
    order = list(rows.groupby("strategy")["gm"].mean().sort_values(ascending=False).index)
    x = alt.X(
        "strategy:N",
        sort=order,
        title="initialization → deployment",
        axis=alt.Axis(labelAngle=-30, labelLimit=200),
    )
    y = alt.Y("technique:N", title=None)
    colour = alt.Color("gm:Q", title="GM", scale=alt.Scale(scheme="viridis"))
    heat = alt.Chart(rows).mark_rect().encode(x, y, colour)
    middle = (rows["gm"].min() + rows["gm"].max()) / 2
    ink = alt.condition(alt.datum.gm > middle, alt.value("black"), alt.value("white"))
    text = alt.Chart(rows).mark_text(fontSize=11).encode(x, y, text=alt.Text("gm:Q", format=".3f"), color=ink)
    return alt.layer(heat, text).properties(width=620, height=190)


def variance(found: Findings) -> Any:
    """Shares of the variance of GM, one bar per replicate."""
    names = {
        "cell": "initialization and deployment",
        "technique": "technique",
        "interplay": "interplay of both",
    }
    parts = {"all strategies": True, "without init: base": False}
    rows = pd.concat(
        [
            contrasts.explained_variance(found, offline)[list(names)].rename(columns=names)
            .rename_axis("replicate").reset_index().melt("replicate", var_name="of", value_name="share").assign(of_what=what)
            for what, offline in parts.items()
        ]
    )  # fmt: skip
    scale = alt.Scale(domain=list(names.values()), range=[COLOURS[0], COLOURS[1], report.GREY])
    return (
        alt.Chart(rows)
        .mark_bar()
        .encode(
            alt.X("share:Q", title="share of the variance of GM", axis=alt.Axis(format="%")),
            alt.Y("replicate:N", title=None),
            alt.Color("of:N", title=None, scale=scale, legend=alt.Legend(orient="top", labelLimit=300)),
            alt.Row("of_what:N", title=None, sort=list(parts)),
        )
        .properties(width=WIDTH, height=90)
    )


def grown(rows: pd.DataFrame, column: str, title: str, log: bool = False) -> Any:
    """Final GM of each averaged strategy against one axis of a study, given the study's `rows`."""
    rows = named(rows[rows["technique"].isin(contrasts.AVERAGED["technique"])])
    mean = rows.groupby(["strategy", column], as_index=False, sort=False)["gm"].mean()
    order = list(dict.fromkeys(rows[column]))
    x = (
        alt.X(f"{column}:Q", title=title, scale=alt.Scale(type="log", base=2))
        if log
        else alt.X(f"{column}:O", title=title, sort=order, axis=alt.Axis(labelAngle=0))
    )
    y = alt.Y("gm:Q", title=GM, scale=alt.Scale(zero=False))
    return _dots_and_means(rows, mean, x, y, _colour(rows))


def weights(found: Findings) -> Any:
    """KA, ZS and GM of Best-in-TIME against the weight of the new expert, in the tuning study."""
    rows = found.final(TUNING[0], **contrasts.BEST_IN_TIME)
    rows = rows.assign(weight=rows["params"].str.extract(r'"weight": ([0-9.]+)')[0].astype(float))
    rows = rows.melt(["weight", "replicate"], ["ka", "zs", "gm"], var_name="metric", value_name="score")
    rows["metric"] = rows["metric"].str.upper()
    x = alt.X("weight:Q", title="weight of the new expert (ema → ema, average)")
    y = alt.Y("score:Q", title="score", scale=alt.Scale(zero=False))
    colour = alt.Color("metric:N", title=None, scale=alt.Scale(range=COLOURS[:3]), legend=LEGEND)
    mean = rows.groupby(["weight", "metric"], as_index=False)["score"].mean()
    return _dots_and_means(rows, mean, x, y, colour)


def named(rows: pd.DataFrame) -> pd.DataFrame:
    """`rows` with `cell` (init/deploy) and `strategy`, the name that the page uses."""
    cell = rows["init"] + "/" + rows["deploy"]
    return rows.assign(cell=cell, strategy=cell.map(NAMES))


def _colour(rows: pd.DataFrame) -> alt.Color:
    """One colour per strategy, the same in every figure; the legend has those in `rows`."""
    shown = [cell for cell in HUES if cell in set(rows["cell"])]
    scale = alt.Scale(domain=[NAMES[cell] for cell in shown], range=[HUES[cell] for cell in shown])
    return alt.Color("strategy:N", title=None, scale=scale, legend=LEGEND)


def _dots_and_means(rows: pd.DataFrame, mean: pd.DataFrame, *channels: Any) -> Any:
    dots = alt.Chart(rows).mark_point(filled=True, size=20, opacity=0.5).encode(*channels)
    return _sized(alt.layer(dots, alt.Chart(mean).mark_line(strokeWidth=2).encode(*channels)))


def _sized(chart: Any) -> Any:
    return chart.properties(width=WIDTH, height=HEIGHT)
