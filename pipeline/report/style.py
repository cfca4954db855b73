"""The style of all figures: colours, legends, sizes, and the values that describe a figure.

Invariant: in every heat map darker means more, on both sides of white for signed values. Colours of groups are Okabe and Ito's,
which colour-blind readers can distinguish.
"""

from dataclasses import dataclass
from typing import Any, Final

import altair as alt
import pandas as pd

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C7F00")
"""Okabe and Ito's colours, the best group first. Their yellow is darkened to be legible on white; black is for references."""
GREY, BLACK, OTHER = "#c4c4c4", "#000000", "other groups"
REFERENCES = (BLACK, "#666666", "#333333", "#888888")
MUCH: Final = "blues"
SIGNED: Final = "blueorange"
WIDTH, HEIGHT = 640, 400
"""A picture's size; on the page a figure is as wide as the page allows."""
FAINT: dict[str, Any] = {"color": GREY, "strokeOpacity": 0.5, "strokeWidth": 1}
"""A grey line. Stroke opacity, because opacity of the whole mark makes a picture slow to draw: one layer for each of hundreds."""
LONG = 45
"""Characters of a name that fit half the width of a page."""
GRADIENT: dict[str, Any] = {"orient": "bottom", "gradientLength": 240, "titleLimit": 400}


@dataclass(frozen=True)
class Choice:
    """A drop-down of a figure. It sets the `signal` of its chart to one of the values of a frame's column, at first to `value`."""

    signal: str
    label: str
    frame: str
    column: str
    value: str


@dataclass(frozen=True)
class Figure:
    """A chart and its explanation. `data` are the frames it refers to, `table` its numbers for the CSV."""

    name: str
    title: str
    reading: str
    chart: Any
    data: tuple[str, ...]
    table: pd.DataFrame
    choices: tuple[Choice, ...] = ()


def named(name: str) -> Any:
    return alt.Chart(alt.NamedData(name))


def sized(chart: Any, height: Any = HEIGHT) -> Any:
    return chart.properties(width="container", height=height)


def layers(shown: pd.Series, others: Any, *more: Any) -> Any:
    """The grey layer below the others, if there is anything grey."""
    return alt.layer(*([others] if (shown == OTHER).any() else []), *more)


def is_(group: str) -> str:
    return f"datum.shown == '{group}'"


def is_not(group: str) -> str:
    return f"datum.shown != '{group}'"


def scale_of(groups: list[str], references: tuple[str, ...] = ()) -> Any:
    colours = [*COLOURS[: len(groups)], *(REFERENCES[i % len(REFERENCES)] for i in range(len(references)))]
    return alt.Scale(domain=[*groups, *references], range=colours)


def colour_of(last: pd.DataFrame, references: bool = False) -> Any:
    """The colours of the best groups, in the order of their GM; with `references`, also of these."""
    rows = last[last["shown"] != OTHER].sort_values("gm", ascending=False, kind="stable")
    groups = rows.loc[~rows["reference"], "group"].tolist()
    also = tuple(rows.loc[rows["reference"], "group"]) if references else ()
    return alt.Color(
        "shown:N", title="Best by GM", scale=scale_of(groups, also), legend=legend_of([*groups, *also])
    )


def legend_of(names: list[str]) -> alt.Legend:
    """A legend below a figure: two columns if names are short, else one, so that no name is cut."""
    narrow = max(map(len, names), default=0) > LONG
    return alt.Legend(
        labelLimit=680 if narrow else 330,
        labelFontSize=10 if narrow else 11,
        symbolOpacity=1,
        orient="bottom",
        columns=1 if narrow else 2,
    )


def tooltip(*metrics: str, first: tuple[str, ...] = ("group:N", "t:O")) -> list[Any]:
    return [*first, *(alt.Tooltip(f"{metric}:Q", format=".3f") for metric in metrics)]


def dark(condition: str) -> Any:
    """White text in dark cells, else black."""
    return alt.condition(condition, alt.value("white"), alt.value("black"))


def short_score(field: str) -> str:
    """An expression that shows a score in [0, 1] with two digits: .43, 1.0."""
    return f"datum.{field} >= 0.995 ? '1.0' : substring(format(datum.{field}, '.2f'), 1)"
