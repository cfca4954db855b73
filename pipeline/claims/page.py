"""docs/reproduction.md from what was found: written by a program from first to last line.

Invariant: every number is of this reproduction; a remark (a person's explanation) is shown only beside the verdict that it was
written for, and what was not judged is said.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from pipeline.claims import claims
from pipeline.claims.judge import Judged, Part
from pipeline.claims.results import Findings, readable
from pipeline.claims.tuning import CELL, TUNING, swept

FIGURES_OF = {
    "C2": {"offline": "Final GM of every offline technique, without replay; points are replicates"},
    "C4": {
        "cells": "Final GM of every cell and technique, mean over replicates",
        "variance": "How the variance of GM is shared out",
    },
    "C5": {"ema_weights": "Best-in-TIME by the weight of the new expert (1 would be continual fine-tuning)"},
    "C6": {"sizes": "Final GM by model size"},
    "C7": {"budgets": "Final GM by budget"},
    "C8": {"horizons": "Final GM by number of tasks, the total budget being the same"},
}
"""Name and caption; the figure over time opens the page."""


def page(
    judged: Sequence[Judged],
    found: Findings,
    about: Mapping[str, Any],
    remarks: Mapping[str, Any],
    folder: str,
) -> str:
    """The whole page in Markdown; `about` says how it was made, `folder` where figures and tables lie beside it."""
    return "\n".join(
        [
            *_opening(judged, about, folder),
            *(line for one in judged for line in _claim(one, remarks, folder)),
            *_explained(found),
            *_parameters(found, folder),
            *_made(about, folder),
        ]
    )


def _opening(judged: Sequence[Judged], about: Mapping[str, Any], folder: str) -> list[str]:
    rows = [
        f"| [{one.number}](#{one.number.lower()}) | {one.claim} | {_effect(one.parts[0])} | **{one.verdict}** |"
        for one in judged
    ]
    return [
        "# Does TIME hold here?",
        "",
        "<!-- written by `make reproduce`; do not edit -->",
        "",
        "TIME's own tables need 63 datasets, a GPU fleet and weeks. Its claims are about orderings, and orderings can be tested on a small",
        f"scale: {about['setting']}",
        "",
        "| | claim | main effect [95 % interval] | verdict |",
        "|---|---|---|---|",
        *rows,
        "",
        "Effects are differences of final GM (the geometric mean of KA and ZS, fractions) unless said otherwise; positive speaks for the claim.",
        "**Rule**, the same for all: a comparison *holds* if it is positive in every replicate and on average at least one point (.01; other",
        "margins are stated), *does not hold* if it is on average not positive, and else *holds weakly*. A claim holds if all its comparisons do",
        "and does not hold if its first one does not. Intervals are Student's t over replicates; with three of them they are wide.",
        "",
        f"![The strategies over time]({folder}/over_time.svg)",
        "",
        "*GM after every task (study `cells`): all train with replay, merges are averages; thick lines are means over replicates, thin ones replicates.*",
        "",
    ]  # fmt: skip


def _claim(one: Judged, remarks: Mapping[str, Any], folder: str) -> list[str]:
    lines = [
        f"## {one.number}",
        "",
        f"**{one.claim}: {one.verdict}.** The paper: {one.paper}.",
        "",
        "| comparison | effect [95 %] | each replicate | margin | |",
        "|---|---|---|---|---|",
        *(_row(part) for part in one.parts),
        "",
        *(line for fact in one.facts for line in (fact, "")),
    ]
    remark = remarks.get(one.number)
    if remark and remark["verdict"] == one.verdict:
        lines += [remark["text"].strip(), ""]
    elif remark:
        lines += [
            f"*(The remark on this claim was written for another verdict, {remark['verdict']}, and is left out.)*",
            "",
        ]
    for name, caption in FIGURES_OF.get(one.number, {}).items():
        lines += [f"![{caption}]({folder}/{name}.svg)", "", f"*{caption}.*", ""]
    return lines


def _row(part: Part) -> str:
    each = " ".join(_number(value) for value in part.values)
    verdict = f"({part.verdict})" if part.beside else f"**{part.verdict}**"
    return f"| {part.says} | {_effect(part)} | {each} | {f'{part.margin:.2f}'[1:]} | {verdict} |"


def _explained(found: Findings) -> list[str]:
    table = claims.explained_variance(found)
    mean = table.mean()
    return [
        "## What explains the scores",
        "",
        f"Shares of the variance of final GM in the grid of {claims.merged_cells(found)['cell'].nunique()} strategies x techniques (study `cells`):",
        "",
        "| replicate | init and deploy together | technique | interplay | init alone* | deploy alone* | technique alone* |",
        "|---|---|---|---|---|---|---|",
        *(_shares(str(name), row) for name, row in table.iterrows()),
        _shares("**mean**", mean),
        "",
        "\\* main effects within the strategies that deploy a merge (all or ema), where every initialization meets every deployment.",
        "",
    ]


def _shares(name: str, row: pd.Series) -> str:
    columns = ("cell", "technique", "interplay", "init_alone", "deploy_alone", "technique_alone")
    return f"| {name} | " + " | ".join(f"{row[column]:.0%}" for column in columns) + " |"


def _parameters(found: Findings, folder: str) -> list[str]:
    if TUNING[0] not in set(found.points["study"]):
        return ["## Parameters", "", "The quick version takes the parameters that the full one chose.", ""]
    rows = swept(found)
    lines = [
        "## Parameters",
        "",
        "One rule for all: in every cell a technique has the parameters with the best final GM of its grid, on a stream that no claim is judged on",
        "(order 100, ten tasks). GM over the grid, the chosen point in bold; what has no factor and no weight has its published defaults.",
        f"As numbers: [{folder}/tuning.csv]({folder}/tuning.csv).",
        "",
        "| replay | init → deploy | technique | GM by parameters |",
        "|---|---|---|---|",
    ]  # fmt: skip
    for cell, group in rows.groupby(CELL, sort=False):
        replay, init, deploy, technique = cell
        points = ", ".join(_point(row) for row in group.itertuples())
        lines.append(f"| {'yes' if replay else 'no'} | {init} → {deploy} | {technique} | {points} |")
    return [*lines, ""]


def _point(row: Any) -> str:
    text = f"{readable(row.params) or 'defaults'} {row.gm:.3f}"
    return f"**{text}**" if row.chosen else text


def _made(about: Mapping[str, Any], folder: str) -> list[str]:
    return [
        "## How this was made",
        "",
        "```sh",
        "make reproduce          # everything, about 60 GB of disk; goes on where it stopped",
        "make reproduce-quick    # one replicate of each, about twenty minutes",
        "```",
        "",
        f"Studies: `configs/studies/time_claims/`. This page: commit `{about['commit']}`, {about['machine']}, {about['steps']}.",
        f"Numbers: [{folder}/final.csv]({folder}/final.csv) (last points), [{folder}/over_time.csv]({folder}/over_time.csv),",
        f"[{folder}/claims.json]({folder}/claims.json) (verdicts, effects, fingerprints of the plans). The same study gives the same numbers on the same",
        "kind of machine and library versions; `make reproduce-quick` says of every verdict whether it is the one above, or that of the same replicate.",
        "",
    ]  # fmt: skip


def _effect(part: Part) -> str:
    width = "" if math.isnan(part.half_width) else f" ± {_number(part.half_width).lstrip('+')}"
    return f"{_number(part.mean)}{width}"


def _number(value: float) -> str:
    return f"{value:+.3f}".replace("0.", ".", 1)
