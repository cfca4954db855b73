"""Writes docs/reproduction.md, from first to last line, from the rows and verdicts.

Invariant: every number is of this reproduction. A remark (a person's explanation) is shown only beside the verdict that it was
written for, and its numbers are looked up (`remarks.py`). What was not judged is stated.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from pipeline.claims import contrasts
from pipeline.claims.judge import ALPHA, EQUIVALENT, HOLDS, REFUTED, UNDECIDED, Judged, Part
from pipeline.claims.remarks import filled
from pipeline.claims.results import Findings, readable
from pipeline.claims.tuning import CELL, TUNING, Tuned, swept

FIGURES_OF = {
    "C2": {"offline": "Final GM of every offline technique, without replay; points are replicates"},
    "C4": {
        "cells": "Final GM of every cell and technique, mean over replicates",
        "variance": "How the variance of GM is shared out",
    },
    "C5": {"ema_weights": "Best-in-TIME by the weight of the new expert (1 would be continual fine-tuning), as the tuning saw it: one order, validation split"},
    "C6": {"sizes": "Final GM by model size"},
    "C7": {"budgets": "Final GM by budget"},
    "C8": {"horizons": "Final GM by number of tasks, the total budget being the same"},
}  # fmt: skip
"""Name and caption; the figure over time is at the top of the page."""
WORDS = {
    HOLDS: "the effect is there: its whole interval lies above the bar",
    REFUTED: "the opposite is there: the whole interval lies below the bar",
    EQUIVALENT: "there is no difference that counts: the whole interval lies within a point (.01) of the bar",
    UNDECIDED: "the interval has the bar inside and is too wide to say",
}
BESIDE = {HOLDS: "above", REFUTED: "below", EQUIVALENT: "no difference", UNDECIDED: "open"}
"""The same as words for comparisons that decide nothing."""


@dataclass(frozen=True)
class About:
    """The context of a page: `setting` and `remarks` are written by a person, `folder` is where figures and tables are beside it."""

    setting: str
    covers: str
    machine: str
    commits: str
    remarks: Mapping[str, Any]
    folder: str


def page(judged: Sequence[Judged], found: Findings, tuned: Tuned, about: About) -> str:
    """The whole page in Markdown. Raises UserError for a remark with a number that cannot be looked up."""
    return "\n".join(
        [
            *_opening(judged, about),
            *(line for one in judged for line in _claim(one, judged, found, about)),
            *_explained(found),
            *_parameters(found, tuned, about.folder),
            *_made(found, about),
        ]
    )


def _opening(judged: Sequence[Judged], about: About) -> list[str]:
    rows = [
        f"| [{one.claim.number}](#{one.claim.number.lower()}) | {one.claim.claim} | **{one.verdict}** | {one.settled_by.says} | {effect(one.settled_by)} |"
        for one in judged
    ]
    count = sum(len(one.claim.deciding) for one in judged)
    return [
        "# Does TIME hold here?",
        "",
        "<!-- written by `make reproduce`; do not edit -->",
        "",
        "TIME's own tables need 63 datasets, a GPU fleet and weeks. Its claims are about orderings, and orderings can be tested on a small",
        f"scale: {about.setting.strip()}",
        "",
        "What the paper claims is cited here from public summaries of it, not from its tables; C8 is a question of ours.",
        "",
        "| | claim | verdict | settled by | effect [95 % interval] |",
        "|---|---|---|---|---|",
        *rows,
        "",
        "Effects are differences of final GM (the geometric mean of KA, what was learned, and ZS, what was kept; fractions) unless said otherwise;",
        "positive speaks for the claim. A claim needs all of its comparisons and has the worst verdict among them:",
        "",
        *(f"- **{word}**: {meaning}." for word, meaning in WORDS.items()),
        "",
        "The bar is 0 unless a comparison says otherwise: the claims are about order, so a verdict is about direction and the size stands beside it.",
        f"{count} comparisons decide the {len(judged)} claims. As they are asked together, an interval must be wider than the 95 % one that is shown (Holm's",
        f"correction): a verdict counts if *p* in the tables is at most {ALPHA:.2f}, and the chance that any verdict of the page is wrong is then about {ALPHA:.0%}",
        "at most. What stands in brackets explains and decides nothing; it is the plain 95 % interval's word on where the effect lies, not corrected.",
        "",
        f"**What the intervals cover**: {about.covers.strip()} Intervals are Student's t.",
        "",
        f"![The strategies over time]({about.folder}/over_time.svg)",
        "",
        "*GM after every task (study `cells`): all train with replay, merges are averages; thick lines are means over replicates, thin ones replicates.*",
        "",
    ]  # fmt: skip


def _claim(one: Judged, judged: Sequence[Judged], found: Findings, about: About) -> list[str]:
    claim = one.claim
    lines = [
        f"## {claim.number}",
        "",
        f"**{claim.claim}: {one.verdict}.** The paper: {claim.paper}.",
        "",
        *comparisons(one),
        "",
        *(line for fact in claim.facts for line in (fact, "")),
    ]
    remark = about.remarks.get(claim.number)
    if remark and remark["verdict"] == one.verdict:
        lines += [filled(remark["text"], found, judged).strip(), ""]
    elif remark:
        lines += [
            f"*(The remark on this claim was written for another verdict, {remark['verdict']}, and is left out.)*",
            "",
        ]
    for name, caption in FIGURES_OF.get(claim.number, {}).items():
        if name != "ema_weights" or found.has(TUNING[0]):
            lines += [f"![{caption}]({about.folder}/{name}.svg)", "", f"*{caption}.*", ""]
    return lines


def triple(means: Iterable[float]) -> str:
    """Scores beside each other, such as KA / ZS / GM."""
    return " / ".join(number(value).lstrip("+") for value in means)


def answered(one: Judged, heading: str) -> list[str]:
    """A question with its verdict and its comparisons, below a heading of these marks."""
    return [
        f"{heading} {one.claim.number}",
        "",
        f"**{one.claim.claim} ({one.claim.paper}): {one.verdict}.**",
        "",
        *comparisons(one),
        "",
    ]


def comparisons(one: Judged) -> list[str]:
    """The table of a claim's comparisons."""
    keys = (part.key for part in one.claim.deciding)
    verdicts = dict(zip(keys, zip(one.verdicts, one.p, strict=True), strict=True))
    return [
        "| comparison | effect [95 %] | each replicate | bar | p | |",
        "|---|---|---|---|---|---|",
        *(_row(part, verdicts.get(part.key)) for part in one.claim.parts),
    ]


def _row(part: Part, decided: tuple[str, float] | None) -> str:
    each = " ".join(number(value) for value in part.values)
    bar = "0" if part.bar == 0 else number(part.bar)
    if decided is None:
        return f"| {part.says} | {effect(part)} | {each} | {bar} | | ({_aside(part)}) |"
    verdict, p = decided
    return f"| {part.says} | {effect(part)} | {each} | {bar} | {probability(p)} | **{verdict}** |"


def _aside(part: Part) -> str:
    """The words for a part that decides nothing."""
    fixed = math.isnan(part.error) and len(part.values) > 1
    return "the same in all" if fixed else BESIDE[part.alone]


def _explained(found: Findings) -> list[str]:
    lines = ["## What explains the scores", ""]
    for offline in (True, False):
        table = contrasts.explained_variance(found, offline)
        cells = contrasts.merged_cells(found, offline)
        lines += [
            f"Shares of the variance of final GM in the grid of {cells['cell'].nunique()} strategies x {cells['technique'].nunique()} techniques (study `cells`)"
            f"{'' if offline else ' without those whose experts start at the base'}:",
            "",
            "| replicate | init and deploy together | technique | interplay | init alone* | deploy alone* | technique alone* |",
            "|---|---|---|---|---|---|---|",
            *(_shares(str(name), row) for name, row in table.iterrows()),
            _shares("**mean**", table.mean()),
            "",
        ]  # fmt: skip
    return [
        *lines,
        "\\* main effects within the strategies that deploy a merge (all or ema), where every initialization meets every deployment.",
        "",
    ]


def _shares(name: str, row: pd.Series) -> str:
    columns = ("cell", "technique", "interplay", "init_alone", "deploy_alone", "technique_alone")
    return f"| {name} | " + " | ".join(f"{row[column]:.0%}" for column in columns) + " |"


def _parameters(found: Findings, tuned: Tuned, folder: str) -> list[str]:
    if not found.has(TUNING[0]):
        return ["## Parameters", "", "The quick version takes the parameters that the full one chose.", ""]
    rows = swept(found)
    several = rows.groupby(CELL)["params"].transform("nunique") > 1
    chosen, edges = rows[rows["chosen"] & several], rows[rows["chosen"] & rows["edge"]]
    split = ", ".join(sorted(set(found.final(TUNING[0])["split"])))
    lines = [
        "## Parameters",
        "",
        "One rule for all: in every cell a technique has the parameters with the best final GM of its grid, on an order of tasks that no claim is judged on",
        f"(order 100, ten tasks; scores of the {split} split). GM over the grid, the chosen point in bold; what has no factor and no weight has its published",
        f"defaults. {len(edges)} of the {len(chosen)} chosen points lie at an edge of their grid. The same scores choose the rivals:",
        *(
            f"{'with' if replay else 'without'} replay the offline technique `{tuned.technique[replay]}` and the strategy {' → '.join(tuned.strategy[replay])}{'.' if not replay else ','}"
            for replay in sorted(tuned.technique, reverse=True)
        ),
        f"As numbers: [tuning]({folder}/rows/tuning.csv), [without replay]({folder}/rows/tuning_no_replay.csv).",
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
    return f"**{text}**{' (edge)' if row.edge else ''}" if row.chosen else text


def _made(found: Findings, about: About) -> list[str]:
    counts = found.rows.groupby("study", sort=False).size()
    missing = [name for name in (*TUNING, *contrasts.STUDIES) if name not in counts.index]
    files = ", ".join(f"[{name}]({about.folder}/rows/{name}.csv) ({count})" for name, count in counts.items())
    return [
        "## How this was made",
        "",
        "```sh",
        "make reproduce          # everything, about 75 GB of disk; goes on where it stopped",
        "make reproduce-quick    # one replicate of each, half an hour to an hour",
        "```",
        "",
        f"Studies: `configs/studies/time_claims/`. Commits of the studies: {about.commits}; {about.machine}.",
        *([f"Not run: {', '.join(missing)}."] if missing else []),
        f"Trajectories, with their numbers: {files}. Page and verdicts are made of these files alone (`python -m pipeline.claims --judge`);",
        f"a test computes every effect, interval and verdict of [claims.json]({about.folder}/claims.json) from them again by other code. The same study gives the same",
        "numbers on the same kind of machine and library versions; `make reproduce-quick` compares one replicate of everything with the numbers above.",
        "",
    ]  # fmt: skip


def effect(part: Part) -> str:
    """`+.137 ± .050`, the 95 % interval of the mean, if there is one."""
    half = part.half_width()
    width = "" if math.isnan(half) else f" ± {number(half).lstrip('+')}"
    return f"{number(part.mean)}{width}"


def number(value: float) -> str:
    """Signed, three digits: `+.137`."""
    return f"{value:+.3f}".replace("0.", ".", 1)


def probability(p: float) -> str:
    return "<.001" if p < 0.001 else f"{p:.3f}".replace("0.", ".", 1)
