"""A report as one HTML file that opens offline: figures as specifications, data once, one script bundle inside.

Invariant: nothing is loaded from anywhere; the page's own policy admits only the two scripts it carries (by digest) and no
evaluated code; text from a study is escaped.
"""

import base64
import hashlib
import html
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import pandas as pd
import vl_convert

from pipeline.report.figures import AXES, Figure
from pipeline.results.over_time import OF_GROUPS

DIGITS = 4
STANDING_ROWS = 12
STANDING = {
    "ka": "KA", "zs": "ZS", "zs_replayed": "ZS replayed", "zs_never_replayed": "ZS never replayed", "gm": "GM",
    "forgetting": "Forgetting", "bwt": "Backward transfer",
}  # fmt: skip
"""Columns of the table of standings; those of the groups are shown where both groups hold sets."""


def spec_of(figure: Figure) -> dict[str, Any]:
    """The Vega-Lite specification without data; every filter is a signal of it, at first "all"."""
    spec = figure.chart.to_dict()
    signals = [{"name": f"only_{axis}", "value": "all"} for axis in AXES]
    return {**spec, "params": [*spec.get("params", []), *signals], "background": "white"}


def svg_of(spec: Mapping[str, Any]) -> str:
    """A Vega-Lite specification as a picture. Wide letters are reckoned with: a reader who has neither font sees narrower ones, not cut ones."""
    return vl_convert.vegalite_to_svg(
        {**spec, "config": {**spec.get("config", {}), "font": "DejaVu Sans, Verdana, sans-serif"}}
    )


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a frame as JSON has them: rounded, null for what is missing."""
    columns = {name: [_plain(value) for value in frame[name]] for name in frame.columns}
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


@dataclass(frozen=True)
class Words:
    """What the page says in text: `partial` is what is not there yet ("" if nothing), `command` the one that wrote it."""

    study: str
    scope: str
    partial: str
    advice: str
    command: str


def page(
    words: Words,
    last: pd.DataFrame,
    spent: pd.DataFrame,
    figures: Sequence[Figure],
    missing: Mapping[str, str],
    data: Mapping[str, pd.DataFrame],
) -> str:
    """The page. `missing` says why a figure (by title) is not drawn."""
    there = last[~last["reference"]]
    axes = {axis: _values(data["points"], axis, set(there["group"])) for axis in AXES}
    payload = {
        "data": {name: _columns(frame) for name, frame in data.items()},
        "axes": {axis: values for axis, values in axes.items() if len(values) > 1},
        "figures": [
            {
                "name": figure.name,
                "data": figure.data,
                "spec": spec_of(figure),
                "filtered": bool({"points", "last"} & set(figure.data)),
            }
            for figure in figures
        ],
    }
    bundle, script = (
        _inside(text)
        for text in (vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"), _read("page.js"))
    )
    more = f"The best {STANDING_ROWS} of {len(last)} groups; tables/standing.csv has all." if len(last) > STANDING_ROWS else ""  # fmt: skip
    return Template(_read("page.html")).substitute(
        study=html.escape(words.study),
        scope=html.escape(words.scope),
        partial=f'<p class="partial">{html.escape(words.partial)}</p>' if words.partial else "",
        advice=html.escape(words.advice),
        more=more,
        standing=standings(last),
        cost=_cost(spent),
        sections="\n".join(
            [_section(f, words.command) for f in figures] + [_absent(*m) for m in missing.items()]
        ),
        payload=json.dumps(payload, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
        hashes=f"{_digest(bundle)} {_digest(script)}",
        bundle=bundle,
        script=script,
    )


def _section(figure: Figure, command: str) -> str:
    return (
        f'<section id="{figure.name}"><h2>{html.escape(figure.title)}</h2>'
        f'<p class="reading">{html.escape(figure.reading)}</p><div class="chart"></div>'
        f"<code>{html.escape(command)} &rarr; figures/{figure.name}.png, .svg, tables/{figure.name}.csv</code></section>"
    )


def _absent(title: str, why: str) -> str:
    return f'<section><h2>{html.escape(title)}</h2><p class="missing">Not drawn: {html.escape(why)}.</p></section>'


def standings(last: pd.DataFrame) -> str:
    """The table of the best groups; ZS of each group of held-out sets has a column where both have a score."""
    shown = STANDING if last[list(OF_GROUPS)].notna().any().all() else {m: n for m, n in STANDING.items() if m not in OF_GROUPS}  # fmt: skip
    head = "".join(f"<th>{name}</th>" for name in ("Group", "t", "Seeds", *shown.values()))
    lines = []
    for row in last.nlargest(STANDING_ROWS, "gm").to_dict("records"):
        cells = [html.escape(row["group"]) + (" (reference)" if row["reference"] else ""), str(row["t"]), str(row["seeds"])]  # fmt: skip
        cells += [_score(row[metric], row[f"{metric}_ci"]) for metric in shown]
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def _cost(spent: pd.DataFrame) -> str:
    """The table of costs, without columns that nobody measured."""
    units: dict[str, tuple[str, Callable[[float], str]]] = {
        "steps": ("Steps", lambda v: f"{v:,.0f}"),
        "steps_one_by_one": ("One by one", lambda v: f"{v:,.0f}"),
        "gflops": ("GFLOPs", lambda v: f"{v:,.0f}" if v else "-"),
        "worker_seconds": ("Worker time (s)", lambda v: f"{v:,.1f}"),
        "cpu_seconds": ("CPU time (s)", lambda v: f"{v:,.1f}"),
        "peak_memory_bytes": ("Peak memory (MiB)", lambda v: f"{v / 2**20:,.0f}"),
        "peak_gpu_memory_bytes": ("Peak GPU memory (MiB)", lambda v: f"{v / 2**20:,.0f}"),
        "bytes_written": ("Written (MiB)", lambda v: f"{v / 2**20:,.1f}"),
    }
    shown = [column for column in units if spent[column].notna().any()]
    head = "".join(f"<th>{html.escape(units[column][0])}</th>" for column in shown)
    lines = []
    for row in spent.to_dict("records"):
        cells = ["-" if math.isnan(row[column]) else units[column][1](row[column]) for column in shown]
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in [row["kind"], *cells]) + "</tr>")
    return f"<table><tr><th>Kind of step</th>{head}</tr>{''.join(lines)}</table>"


def _score(mean: float, half: float) -> str:
    if math.isnan(mean):
        return "-"
    return f"{mean:.3f}" if math.isnan(half) else f"{mean:.3f} ± {half:.3f}"


def _values(points: pd.DataFrame, axis: str, groups: set[str]) -> list[str]:
    return [str(value) for value in dict.fromkeys(points.loc[points["group"].isin(groups), axis])]


def _columns(frame: pd.DataFrame) -> dict[str, Any]:
    """A frame by column; text is a code per row into its levels, for the names of trajectories are long and repeat."""
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


def _inside(script: str) -> str:
    """A script that may stand inside its element and means the same there."""
    return script.replace("</script", "<\\/script")


def _digest(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _read(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")
