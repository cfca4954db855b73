"""The parts of a report's page as HTML.

Invariant: all text is escaped; a part without content is "".
"""

import html
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from pipeline.report.data import Data
from pipeline.report.frames import RECALL
from pipeline.report.style import Figure
from pipeline.report.summary import CODE
from pipeline.report.winner import Winner
from pipeline.results.over_time import OF_GROUPS

METRICS = {
    "ka": "KA", "zs": "ZS", "zs_replayed": "ZS replayed", "zs_never_replayed": "ZS never replayed", "gm": "GM",
    "forgetting": "Forgetting", "bwt": "Backward transfer",
}  # fmt: skip
"""Columns of the table of standings; those of the groups are shown if both groups hold sets."""
UNITS: dict[str, tuple[str, Callable[[float], str]]] = {
    "steps": ("Steps", lambda v: f"{v:,.0f}"),
    "steps_one_by_one": ("One by one", lambda v: f"{v:,.0f}"),
    "gflops": ("GFLOPs", lambda v: f"{v:,.0f}" if v else "-"),
    "worker_seconds": ("Worker time (s)", lambda v: f"{v:,.1f}"),
    "cpu_seconds": ("CPU time (s)", lambda v: f"{v:,.1f}"),
    "peak_memory_bytes": ("Peak memory (MiB)", lambda v: f"{v / 2**20:,.0f}"),
    "peak_gpu_memory_bytes": ("Peak GPU memory (MiB)", lambda v: f"{v / 2**20:,.0f}"),
    "bytes_written": ("Written (MiB)", lambda v: f"{v / 2**20:,.1f}"),
}


def terms(data: Data) -> str:
    """The definitions of KA, ZS and GM for this report's scores."""
    scored = "accuracy"
    if (data.scores["measure"] == RECALL).any():
        scored += f", or {RECALL} (the mean of both directions) of retrieval sets"
    return (
        "<dfn>KA</dfn>, knowledge accumulation, is the mean score over the sets that the tasks teach, seen yet or not; <dfn>ZS</dfn>, zero-shot "
        "retention, the mean over held-out sets, which the base could do and no task teaches; <dfn>GM</dfn> is the geometric mean of the two. "
        f"A score is {scored}, a fraction in [0, 1]; t counts the tasks seen, t = 0 is the base."
    )


def winner(found: Winner | None, here: Path) -> str:
    """Where the advised model is and how to use it."""
    if found is None:
        return ""
    place = html.escape(found.directory)
    if found.linked:
        link = html.escape(Path(os.path.relpath(found.directory, here)).as_posix(), quote=True)
        place = f'<a href="{link}"><code>{place}</code></a>'
    lines = [
        ("Model", f"what <b>{html.escape(found.trajectory)}</b> serves after t = {found.t} ({html.escape(found.task)})"),
        ("Where", place),
        ("sha256", f"<code>{html.escape(found.sha256)}</code>"),
        ("Base", f"{html.escape(found.base)}, sha256 <code>{html.escape(found.base_sha256)}</code>"),
        *((title, f"<pre>{html.escape(text)}</pre>") for title, text in found.ways),
    ]  # fmt: skip
    return f"<dl>{''.join(f'<dt>{title}</dt><dd>{text}</dd>' for title, text in lines)}</dl>"


def navigation(figures: Sequence[Figure], absent: Mapping[str, str]) -> str:
    """Links to all sections of the page."""
    named = [("standing", "Standing"), *((one.name, one.title) for one in figures), ("cost", "Cost by kind of step"), ("study", "The study")]  # fmt: skip
    named += [("missing", "Not drawn")] if absent else []
    links = "".join(f'<li><a href="#{name}">{html.escape(title)}</a></li>' for name, title in named)
    return f'<nav aria-label="Sections"><ul>{links}</ul></nav>'


def filters() -> str:
    """The place of the script's drop-downs, one per axis; hidden until there are some."""
    return '<form class="filters" id="filters" aria-label="Filters" hidden><span id="kept" role="status"></span></form>'


def standing(data: Data) -> str:
    """The table of groups: the value of each in every axis, and its metrics at the last t."""
    last = data.last.sort_values("gm", ascending=False, kind="stable")
    metrics = METRICS if last[list(OF_GROUPS)].notna().any().all() else {m: n for m, n in METRICS.items() if m not in OF_GROUPS}  # fmt: skip
    axes = list(data.axes.shown)
    heads = [("group", "Group", "text"), *((axis, axis, "text axis") for axis in axes)]
    heads += [("t", "t", ""), ("seeds", "Seeds", ""), *((name, title, "") for name, title in metrics.items())]
    head = "".join(
        f'<th scope="col" class="{kind}"><button type="button" data-by="{html.escape(name)}">{html.escape(title)}</button></th>'
        for name, title, kind in heads
    )
    rows = "".join(_standing_row(row, data.axes.values.loc[row["group"], axes], metrics) for row in last.to_dict("records"))  # fmt: skip
    return (
        '<section id="standing"><h2>Standing</h2><p class="reading">At the last t, mean over seeds; ± is half the 95 % interval. '
        "Forgetting is how far earlier tasks lie below their best, backward transfer what later tasks did to them. "
        'A button sorts by its column. <a href="tables/standing.csv">CSV of all columns</a></p>'
        f'<table id="standings"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
        '<button type="button" id="all" hidden></button></section>'
    )


def _standing_row(row: Mapping[str, object], axes: pd.Series, metrics: Mapping[str, str]) -> str:
    group = html.escape(str(row["group"])).replace(
        "_", "_<wbr>"
    )  # a name that is long is broken between words
    small = " · ".join(f"{axis} {value}" for axis, value in axes.items())
    name = f"{group}{' (reference)' if row['reference'] else ''}<small>{html.escape(small)}</small>"
    cells = [f'<th scope="row" class="text">{name}</th>']
    cells += [f'<td class="text axis">{html.escape(str(value))}</td>' for value in axes]
    cells += [f"<td>{row[name]}</td>" for name in ("t", "seeds")]
    cells += [f'<td data-metric="{m}">{score(_number(row[m]), _number(row[f"{m}_ci"]))}</td>' for m in metrics]  # fmt: skip
    return f'<tr data-group="{html.escape(str(row["group"]), quote=True)}">{"".join(cells)}</tr>'


def figure(one: Figure) -> str:
    """A figure's section: its reading, its place, its files."""
    files = " · ".join(
        f'<a href="{place}/{one.name}.{kind}">{kind.upper()}</a>'
        for place, kind in (("figures", "svg"), ("figures", "png"), ("tables", "csv"))
    )
    return (
        f'<section id="{one.name}" class="figure"><h2>{html.escape(one.title)}</h2><p class="reading">{html.escape(one.reading)}</p>'
        f'<div class="choices"></div><div class="chart"></div><p class="files">{files}</p></section>'
    )


def costs(spent: Sequence[tuple[str, pd.DataFrame]]) -> str:
    """The table of costs, without columns that were not measured."""
    shown = [column for column in UNITS if any(table[column].notna().any() for _, table in spent)]
    head = "".join(f'<th scope="col">{html.escape(UNITS[column][0])}</th>' for column in shown)
    lines = []
    for study, table in spent:
        for row in table.to_dict("records"):
            kind = html.escape(row["kind"] if len(spent) == 1 else f"{study}: {row['kind']}")
            cells = ["-" if math.isnan(row[column]) else UNITS[column][1](row[column]) for column in shown]
            lines.append(f'<tr><th scope="row" class="text">{kind}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')  # fmt: skip
    return (
        '<section id="cost"><h2>Cost by kind of step</h2><p class="reading">Sums over all steps of the study, each counted once; one by one is how '
        "many there would be without sharing. Memory is the most that one process had at once, mapped files included. "
        f'<a href="tables/cost.csv">CSV</a></p><table><thead><tr><th scope="col" class="text">Kind of step</th>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></section>'
    )


def studies(summaries: Sequence[tuple[str, Sequence[tuple[str, str]]]]) -> str:
    """The summaries of the studies."""
    parts = []
    for name, lines in summaries:
        told = "".join(
            f"<dt>{html.escape(title)}</dt><dd>{f'<code>{html.escape(text)}</code>' if title in CODE else html.escape(text)}</dd>"
            for title, text in lines
        )
        parts.append((f"<h3>{html.escape(name)}</h3>" if len(summaries) > 1 else "") + f"<dl>{told}</dl>")
    return f'<section id="study"><h2>The stud{"y" if len(summaries) == 1 else "ies"}</h2>{"".join(parts)}</section>'


def missing(absent: Mapping[str, str]) -> str:
    """Figures that cannot be drawn from these results, with the reasons."""
    if not absent:
        return ""
    lines = "".join(f"<li>{html.escape(title)}: {html.escape(why)}.</li>" for title, why in absent.items())
    return f'<section id="missing"><h2>Not drawn</h2><ul>{lines}</ul></section>'


def score(mean: float, half: float) -> str:
    """A mean with half its interval, as far as they exist."""
    if math.isnan(mean):
        return "-"
    return f"{mean:.3f}" if math.isnan(half) else f"{mean:.3f} ±\N{NO-BREAK SPACE}{half:.3f}"


def _number(value: object) -> float:
    return math.nan if value is None else float(value)  # type: ignore[arg-type]
