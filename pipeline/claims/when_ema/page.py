"""Writes docs/when_ema.md, from first to last line, from the kept numbers.

Invariant: every number is computed from docs/when_ema/numbers; the number of replicates is stated at the top.
"""

import json
import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.claims.judge import EQUIVALENT, HOLDS, REFUTED, UNDECIDED
from pipeline.claims.when_ema import advising, measures, reasons
from pipeline.claims.when_ema.design import Design
from pipeline.claims.when_ema.figures import draw_all, summary
from pipeline.claims.when_ema.hypotheses import Answer, Hypothesis, Judgement, judge_all
from pipeline.claims.when_ema.measures import EE, EL, END, FT, LE, STREAM, ZERO
from pipeline.claims.when_ema.numbers import Numbers

CAPTIONS = {
    "map": "Gain of Best-in-TIME over fine-tuning at each share of replay and rate, each with its best weight there; pale where the interval holds 0 or there is none",
    "shares": "What each arm gains over fine-tuning, rate and weight chosen on val, with 95 % intervals; thin lines are replicates of Best-in-TIME",
    "weights": "The weight of the new expert that is best on val, mean over replicates with 95 % intervals; 1 is fine-tuning",
    "why": "Gain at one rate against what the middle of a task vector spares of the loss on old data; a point per replicate, share and rate",
}
READING = """A comparison *holds* if its interval lies above 0, is *refuted* if it lies below, *equivalent* if it lies within .005 of 0 (.05 for weights), and else
*undecided*; what stands in brackets decides nothing. A hypothesis has the worst verdict of its parts. H3 claims that there is no difference: it holds if all
five comparisons are equivalent, and is refuted if one of them is decided (Holm, of ten) to lie beyond .005."""
VERB = {HOLDS: "gains", REFUTED: "loses", EQUIVALENT: "ties (within .005)", UNDECIDED: "is undecided"}
WORTH = "It is above one constant weight for all settings, so [reports](report.md) advise it where drift and replay lie within these ranges."
BLOCK = re.compile(r"(<!-- advice of when_ema -->\n).*?(<!-- end -->)", re.DOTALL)
"""Where another page repeats the advice."""


def write(target: Path, numbers: Numbers, design: Design) -> list[str]:
    """Write the page at `target`, and figures, verdicts and the fitted advice in a folder beside it; returns a line per
    hypothesis.
    """
    core = measures.core(numbers, design.core)
    judged, advice = judge_all(core), advising.fitted(core)
    folder = target.parent / target.stem
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in draw_all(core).items():
        (folder / f"{name}.svg").write_text(picture, encoding="utf-8")
    kept = {
        "verdicts.json": verdicts_as_json(judged),
        "advice.json": None if advice is None else advice.to_json(),
    }
    for name, body in kept.items():
        (folder / name).write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    target.write_text(page(numbers, core, judged, design, folder.name), encoding="utf-8")
    return [f"{one.name} {one.verdict}: {one.says}" for one in judged.hypotheses]


def page(numbers: Numbers, core: Numbers, judged: Judgement, design: Design, folder: str) -> str:
    """The whole page in Markdown; `folder` holds the figures beside it."""
    lines = [
        *_opening(judged, design, folder),
        *_gains(judged, core),
        *(line for one in judged.hypotheses for line in _hypothesis(one)),
        *_weights(core),
        *_figure("weights", folder),
        *_why(core, folder),
        *_fringe(numbers, design),
        *_advice(core),
        *_made(numbers, folder),
    ]
    return "\n".join(lines)


def verdicts_as_json(judged: Judgement) -> dict[str, Any]:
    """All comparisons with all digits."""
    return {
        "replicates": list(judged.replicates),
        "hypotheses": {
            one.name: {
                "says": one.says, "verdict": one.verdict,
                "deciding": [_plain(answer) for answer in one.deciding], "beside": [_plain(answer) for answer in one.beside],
            }
            for one in judged.hypotheses
        },
        "gains": [_plain(answer) for answer in judged.gains],
        "above_base": [_plain(answer) for answer in judged.above_base],
    }  # fmt: skip


def _plain(answer: Answer) -> dict[str, Any]:
    part = answer.part
    half = part.half_width()
    return {
        "key": part.key, "says": part.says, "verdict": answer.verdict, "effect": part.mean, "half_width": None if math.isnan(half) else half,
        "margin": part.margin, "values": {str(name): float(value) for name, value in part.values.items()},
    }  # fmt: skip


def _opening(judged: Judgement, design: Design, folder: str) -> list[str]:
    count, planned = len(judged.replicates), len(design.replicates)
    rests = f"**These verdicts rest on {count} of {planned} replicates**"
    rests += "." if count == planned else "; they are provisional until all are there."
    if count == 1:
        rests += " One replicate alone decides nothing."
    return [
        "# When does ema → ema beat fine-tuning?",
        "",
        "<!-- written by `make when-ema`; do not edit -->",
        "",
        "Best-in-TIME (`ema → ema`) starts every expert at a running average and serves that average; fine-tuning starts at and serves the latest expert. Which is",
        "better depends on how much is replayed and how far a task drifts. The study was written down before it was run: `configs/studies/when_ema/README.md` has",
        "its design, hypotheses and rule of decision.",
        "",
        rests,
        "",
        "| | hypothesis | verdict |",
        "|---|---|---|",
        *(f"| [{one.name}](#{one.name.lower()}) | {one.says} | **{one.verdict}** |" for one in judged.hypotheses),
        "",
        paragraph(judged),
        "",
        *READING.splitlines(),
        "",
        *_figure("map", folder),
        "Scores are GM, the geometric mean of KA and ZS, on `test`, averaged over the stream (t ≥ 1); rate and weight were chosen on `val`, by each replicate for itself.",
        "A replicate has its own base, order of tasks and seed of training. Intervals are Student's t over replicates.",
        "",
        *_figure("shares", folder),
    ]  # fmt: skip


def paragraph(judged: Judgement) -> str:
    """The advice that the verdicts support, in one paragraph."""
    of = {one.name: one for one in judged.hypotheses}
    text = (
        f"**Advice.** Of Best-in-TIME against fine-tuning, by the share of replay in a batch: {_by_share(judged, judged.gains)}. "
        f"Against the base itself (zero-shot): {_by_share(judged, judged.above_base)}."
    )
    if of["H2"].verdict == HOLDS:
        text += " The further a task drifts, the more averaging pays: consider it for high rates and long tasks first."
    if of["H3"].verdict == HOLDS:
        text += " `latest → ema` does as well and shares the experts of fine-tuning, so it can be tried without training anything."
    by_drift, by_share = (answer.verdict == HOLDS for answer in of["H4"].deciding)
    less = (["the further tasks drift"] if by_drift else []) + (["the less is replayed"] if by_share else [])
    if less:
        text += f" Give the new expert less weight {' and '.join(less)}."
    return text


def with_advice(text: str, page: str) -> str:
    """Another page (`text`) with the paragraph of advice of this study's `page` in its block."""
    (advice,) = re.findall(r"^\*\*Advice\.\*\* (.*)$", page, re.MULTILINE)
    filled = textwrap.fill(advice, 138, break_long_words=False, break_on_hyphens=False)
    return BLOCK.sub(lambda found: f"{found[1]}{filled}\n{found[2]}", text)


def _by_share(judged: Judgement, answers: Sequence[Answer]) -> str:
    """The shares of each verdict in words."""
    groups = {
        verdict: [
            f"{share:g}"
            for share, answer in zip(judged.shares, answers, strict=True)
            if answer.verdict == verdict
        ]
        for verdict in VERB
    }
    return "; ".join(
        f"it {verb} at {'a share' if len(groups[verdict]) == 1 else 'shares'} of {_listed(groups[verdict])}"
        for verdict, verb in VERB.items()
        if groups[verdict]
    )


def _gains(judged: Judgement, core: Numbers) -> list[str]:
    ends = measures.endpoints(core)
    picks, each = measures.chosen(ends), measures.gains(measures.chosen(ends, ["lr"]), by=["lr"])
    table = summary(each, "gain", ["share", "lr"]).set_index(["share", "lr"])
    rates = sorted(each["lr"].unique())
    rows = []
    for share, answer in zip(judged.shares, judged.gains, strict=True):
        at = " | ".join(
            _number(table.loc[(share, lr), "mean"], table.loc[(share, lr), "half"]) for lr in rates
        )
        rows.append(f"| {share:g} | {_effect(answer)} | **{answer.verdict}** | {at} |")
    return [
        "## The gain by share of replay",
        "",
        f"Best-in-TIME less fine-tuning. Verdicts are adjusted over the {len(judged.shares)} shares (Holm); *holds* is a gain, *refuted* a loss, *equivalent* a",
        "difference within .005. The columns on the right hold the rate fixed for both and choose weights alone.",
        "",
        f"| share | gain, each at its best rate and weight | | {' | '.join(f'both at {lr:g}' for lr in rates)} |",
        "|---|---|---|" + "---|" * len(rates),
        *rows,
        "",
        *_against_base(picks, judged.shares),
        "What the gain is made of, each at its best rate and weight; ZS apart for sets whose training side is replayed and sets of which nothing ever is:",
        "",
        "| share | GM over the stream | GM at the end | KA | ZS | ZS, replayed | ZS, never replayed |",
        "|---|---|---|---|---|---|---|",
        *_parts(picks, judged.shares),
        "",
    ]  # fmt: skip


def _against_base(picks: pd.DataFrame, shares: Sequence[float]) -> Iterator[str]:
    tables = [
        summary(measures.gains(picks, arm=arm, over=ZERO), "gain", ["share"]).set_index("share")
        for arm in (FT, EL, LE, EE)
    ]
    yield "Each arm at its best rate and weight less zero-shot, which is the base itself: where all lie below 0, a gain over fine-tuning is a smaller loss."
    yield from (
        "",
        "| share | fine-tuning | ema → latest | latest → ema | Best-in-TIME |",
        "|---|---|---|---|---|",
    )
    for share in shares:
        cells = (_number(table.loc[share, "mean"], table.loc[share, "half"]) for table in tables)
        yield f"| {share:g} | {' | '.join(cells)} |"
    yield ""


def _parts(picks: pd.DataFrame, shares: Sequence[float]) -> Iterator[str]:
    scores = (STREAM, END, "ka", "zs", "zs_replayed", "zs_never_replayed")
    tables = [
        summary(measures.gains(picks, score=score), "gain", ["share"]).set_index("share") for score in scores
    ]
    for share in shares:
        cells = [
            _number(table.loc[share, "mean"], table.loc[share, "half"]) if share in table.index else "-"
            for table in tables
        ]
        yield f"| {share:g} | {' | '.join(cells)} |"


def _hypothesis(one: Hypothesis) -> list[str]:
    lines = [
        f"## {one.name}",
        "",
        f"**{one.says}: {one.verdict}.**",
        "",
        "| comparison | effect [95 %] | each replicate | |",
        "|---|---|---|---|",
    ]
    lines += [_row(answer, f"**{answer.verdict}**") for answer in one.deciding]
    lines += [_row(answer, f"({answer.verdict})") for answer in one.beside]
    return [*lines, ""]


def _row(answer: Answer, verdict: str) -> str:
    each = " ".join(_number(value) for value in answer.part.values)
    return f"| {answer.part.says} | {_effect(answer)} | {each} | {verdict} |"


def _weights(core: Numbers) -> list[str]:
    """The weight that is best on val by share and rate."""
    ends = measures.endpoints(core)
    best, least = measures.best_weights(ends), ends["weight"].min()
    table = summary(best, "best", ["share", "lr"])
    means = table.pivot_table(index="share", columns="lr", values="mean")
    lines = [
        "The weight of the new expert that is best on val, mean over replicates; 1 is fine-tuning:",
        "",
        f"| share | {' | '.join(f'at {lr:g}' for lr in means.columns)} |",
        f"|---|{'---|' * len(means.columns)}",
    ]
    for share, row in means.iterrows():
        lines.append(f"| {share:g} | {' | '.join(f'{value:.2f}'.lstrip('0') for value in row)} |")
    edge = f"In {(best['best'] == least).sum()} of {len(best)} cells it is {least:g}, the least of the grid, so a lower one may be better still."
    return [*lines, "", edge, ""]


def _why(core: Numbers, folder: str) -> list[str]:
    rows = reasons.correlations(core)
    lines = [
        "## Why",
        "",
        "How the gain at one rate goes with what was recorded of experts: the correlation over shares and rates within each replicate, and its mean over",
        "replicates. These are descriptions; nothing was decided by them.",
        "",
        "| recorded | correlation with the gain [95 %] |",
        "|---|---|",
        *(f"| {reasons.SAYS[row.measure]} | {_number(row.mean, row.half)} |" for row in rows.itertuples()),
        "",
    ]  # fmt: skip
    table = reasons.by_share(core)
    lines += [
        "| share | drift | old loss gained by a task | spared at half the way | average above its parts, latest → ema | the same, Best-in-TIME |",
        "|---|---|---|---|---|---|",
        *(f"| {row.share:g} | {row.drift:.3f} | {row.forgotten:+.3f} | {row.spared:+.3f} | {_number(row.bend_le)} | {_number(row.bend_ee)} |" for row in table.itertuples()),
        "",
        "Means over rates, tasks and replicates. Losses are those of fine-tuning's experts along their task vectors, on data of the pool and of earlier tasks; the last columns",
        "are the GM of a deployed average less what lies between the GMs of the two models that it averages, mean over weights.",
        "",
    ]  # fmt: skip
    return [*lines, *_figure("why", folder)]


def _fringe(numbers: Numbers, design: Design) -> list[str]:
    ran = set(numbers.made["piece"])
    fringe = dict.fromkeys(piece.name for piece in design.pieces if not piece.core)
    missing = ", ".join(f"`{name}`" for name in fringe if name not in ran)
    lines = ["## Other settings", ""]
    if missing:
        lines += [
            f"Not run yet: {missing} of `configs/studies/when_ema/pieces.yaml` (other lengths of task and stream, another size, the pool or the buffer alone).",
            "",
        ]
    if not ran & fringe.keys():
        return lines
    rows = reasons.settings(numbers)
    lines += [
        "One axis at a time around a share of .2, fewer replicates, plain intervals; no verdict rests on these.",
        "",
        "| piece | replicates | model | tasks | steps | pool / buffer | gain of Best-in-TIME | of latest → ema | drift |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.piece} | {row.count} | {row.model} | {row.tasks} | {row.steps_per_task} | {row.pretraining:g} / {row.buffer:g} "
        f"| {_number(row.ee, row.ee_half)} | {_number(row.le, row.le_half)} | {row.drift:.3f} |"
        for row in rows.itertuples()
    ]  # fmt: skip
    return [*lines, ""]


def _advice(core: Numbers) -> list[str]:
    advice, tested = advising.fitted(core), advising.tested(core)
    if advice is None or tested.empty:
        return ["## The advised weight", "", "Not enough replicates to fit it and to test it on others.", ""]
    worth = measures_of(tested)
    return [
        "## The advised weight",
        "",
        f"logit w = {advice.constant:.2f} {advice.by_drift:+.2f} log10(drift) {advice.by_share:+.2f} share, fitted to all replicates, for drifts from {advice.drifts[0]:.3f} to",
        f"{advice.drifts[1]:.3f} and shares from {advice.shares[0]:g} to {advice.shares[1]:g}. Tested on replicates that had no part in it (their order, base and seed are their own):",
        "",
        "| what the advised weight gains over | effect [95 %] | each replicate | |",
        "|---|---|---|---|",
        *(_row(answer, f"({answer.verdict})") for answer in worth),
        "",
        WORTH if worth[0].verdict == HOLDS else "It was not shown to be above one constant weight for all settings, so nothing here advises it.",
        "",
    ]  # fmt: skip


def measures_of(tested: pd.DataFrame) -> list[Answer]:
    """The advised weight against the best constant one, fine-tuning, and the weight chosen on the replicate's own `val`."""
    from pipeline.claims.when_ema.hypotheses import beside

    table = tested.set_index("replicate")
    says = {
        "constant": "the constant weight that is best for the other replicates",
        "fine-tuning": "fine-tuning",
        "own": "the weight chosen on the replicate's own val",
    }
    return [beside(name, text, table["advised"] - table[name]) for name, text in says.items()]


def _made(numbers: Numbers, folder: str) -> list[str]:
    made = numbers.made
    return [
        "## How this was made",
        "",
        "```sh",
        "make when-ema           # runs what is missing and writes this page; goes on where it stopped",
        "```",
        "",
        f"{len(made)} pieces of {made['replicate'].nunique()} replicates, {made['minutes'].sum() / 60:.1f} hours; commits {_listed(sorted(set(made['commit'].astype(str))))}. Numbers:",
        f"`docs/{folder}/numbers` (a folder for each piece: points, experts, and what was run with the sha256 of its base), `docs/{folder}/verdicts.json`,",
        f"`docs/{folder}/advice.json`.",
        "",
    ]  # fmt: skip


def _figure(name: str, folder: str) -> list[str]:
    return [f"![{CAPTIONS[name]}]({folder}/{name}.svg)", "", f"*{CAPTIONS[name]}.*", ""]


def _effect(answer: Answer) -> str:
    return _number(answer.part.mean, answer.part.half_width())


def _number(value: float, half: float = math.nan) -> str:
    if math.isnan(value):
        return "-"
    text = f"{value:+.4f}".replace("0.", ".", 1)
    return text if math.isnan(half) else f"{text} ± {half:.4f}".replace("± 0.", "± .")


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
