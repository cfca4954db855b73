"""A report as one HTML file that opens offline: specifications of figures, each row of data once, one script bundle.

Invariant: nothing is loaded from elsewhere. The page's content security policy admits only its two scripts (by digest) and no
evaluated code; text from a study is escaped; a section without content is left out.
"""

import base64
import hashlib
import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from string import Template
from typing import Any

import pandas as pd
import vl_convert

from pipeline.report import sections
from pipeline.report.data import Data
from pipeline.report.style import WIDTH, Figure
from pipeline.report.winner import Winner
from pipeline.results.over_time import OF_GROUPS

DIGITS = 4
POINTS = (
    "group",
    "t",
    "shown",
    "reference",
    "joint",
    "seed",
    "ka",
    "zs",
    "gm",
    "forgetting",
    "bwt",
    *OF_GROUPS,
)
LAST = (
    "group", "t", "shown", "reference", "joint", "front", "ka", "zs", "gm", "forgetting", "bwt", *OF_GROUPS, "gflops", "seconds",
    "front_gflops", "front_seconds", "strategy", "choice", "settings", "slice", "budget_line", "budget_shown", "horizon_line", "horizon_shown",
    "steps_per_task", "tasks",
)  # fmt: skip
SCORES = ("trajectory", "t", "row", "role", "score", "arrival")


@dataclass(frozen=True)
class Page:
    """The text of the page. `partial` is what is not there yet ("" if nothing), `command` the one that wrote it, `made_by` those
    that made the studies, `missing` why a figure (by title) is not drawn, `here` the directory of the page.
    """

    title: str
    scope: str
    partial: str
    advice: str
    winner: Winner | None
    command: str
    made_by: tuple[str, ...]
    summaries: tuple[tuple[str, list[tuple[str, str]]], ...]
    spent: tuple[tuple[str, pd.DataFrame], ...]
    figures: Sequence[Figure] = ()
    missing: Mapping[str, str] = field(default_factory=dict)
    here: Path = Path()


def page(said: Page, data: Data) -> str:
    """The page."""
    bundle, script = (_inside(text) for text in (_bundle(), _read("page.js")))
    parts = [
        sections.navigation(said.figures, said.missing),
        sections.filters(),
        sections.standing(data),
        *(sections.figure(one) for one in said.figures),
        sections.costs(said.spent),
        sections.studies(said.summaries),
        sections.missing(said.missing),
    ]
    return Template(_read("page.html")).substitute(
        title=html.escape(said.title),
        scope=html.escape(said.scope),
        partial=f'<p class="partial">{html.escape(said.partial)}</p>' if said.partial else "",
        advice=html.escape(said.advice),
        terms=sections.terms(data),
        winner=sections.winner(said.winner, said.here),
        sections="\n".join(filter(None, parts)),
        command=html.escape(said.command),
        style=_read("page.css"),
        payload=json.dumps(payload(said.figures, data), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
        hashes=f"{_digest(bundle)} {_digest(script)}",
        bundle=bundle,
        script=script,
    )  # fmt: skip


def payload(figures: Sequence[Figure], data: Data) -> dict[str, Any]:
    """The data of the page's script: frames by column, the axes of the groups, the figures."""
    values = data.axes.values[list(data.axes.shown)]
    told = data.last[~data.last["reference"]].set_index("group").index
    seeds = sorted(int(seed) for seed in data.points["seed"].unique())
    axes = {axis: list(dict.fromkeys(values.loc[told, axis])) for axis in values}
    axes |= {"seed": [str(seed) for seed in seeds]} if len(seeds) > 1 else {}
    of_trajectories = data.points.drop_duplicates("trajectory")[["trajectory", "group", "seed"]]
    return {
        "data": {name: _columns(frame) for name, frame in frames_of(data, figures).items()},
        "groups": _columns(values.rename_axis("group").reset_index()),
        "trajectories": _columns(of_trajectories),
        "axes": axes,
        "figures": [
            {
                "name": figure.name,
                "data": figure.data,
                "spec": spec_of(figure),
                "choices": [vars(choice) for choice in figure.choices],
            }
            for figure in figures
        ],
    }


def frames_of(data: Data, drawn: Sequence[Figure]) -> dict[str, pd.DataFrame]:
    """Every frame that the figures refer to, with the columns they use."""
    shared = {"points": data.points[list(POINTS)], "last": data.last[list(LAST)], "scores": _roles(data)}
    own = {name: figure.table for figure in drawn for name in figure.data if name not in shared}
    return {**own, **shared}


def spec_of(figure: Figure) -> dict[str, Any]:
    """The Vega-Lite specification without data, as wide as its container; every choice is one of its signals."""
    spec = figure.chart.to_dict(validate=False)  # tests validate; here validation would take most of the time
    signals = [{"name": choice.signal, "value": choice.value} for choice in figure.choices]
    return {
        **spec,
        "params": [*spec.get("params", []), *signals],
        "background": "white",
        "autosize": {"type": "fit-x", "contains": "padding"},
        "description": f"{figure.title}. {figure.reading}",
    }


def still(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A specification for a picture of fixed width."""
    return {**{key: value for key, value in spec.items() if key != "autosize"}, "width": WIDTH}


def svg_of(spec: Mapping[str, Any]) -> str:
    """A Vega-Lite specification as a picture. It is laid out for wide letters, so a viewer without these fonts shows narrower
    text, not cut text.
    """
    return vl_convert.vegalite_to_svg(
        {**spec, "config": {**spec.get("config", {}), "font": "DejaVu Sans, Verdana, sans-serif"}}
    )


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a frame as JSON values: rounded, null for missing ones."""
    columns = {name: [_plain(value) for value in frame[name]] for name in frame.columns}
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def _roles(data: Data) -> pd.DataFrame:
    """The scores, with a short text for the role of a dataset."""
    scores = data.scores
    replayed = scores["zero_shot"].fillna("").astype(str).str.replace("_", " ")
    role = scores["role"].str.replace("_", " ")
    return scores.assign(role=role.where(replayed == "", role + ", " + replayed))[list(SCORES)]


def _columns(frame: pd.DataFrame) -> dict[str, Any]:
    """A frame by column; text is a code per row into its levels, because the names of trajectories are long and repeat."""
    found: dict[str, Any] = {}
    for name in frame.columns:
        if pd.api.types.is_numeric_dtype(frame[name]):
            found[name] = {"values": [_plain(value) for value in frame[name]]}
        else:
            codes, levels = pd.factorize(frame[name], use_na_sentinel=False)
            found[name] = {"levels": [_plain(level) for level in levels], "codes": codes.tolist()}
    return found


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float):
        return None if math.isnan(value) else round(value, DIGITS)
    return value


@cache
def _bundle() -> str:
    """The script that draws the figures in a browser; building it takes most of the time of a page."""
    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))


def _inside(script: str) -> str:
    """The script with escapes that allow it inside its element; its meaning is unchanged."""
    return script.replace("</script", "<\\/script")


def _digest(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _read(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")
