"""`python -m pipeline.claims.data_driven`: what data buys. Runs two studies, keeps their rows, judges five questions of each, writes the page.

The questions and their comparisons stand here as they were before the study was run. Invariant: the page is made from the kept
rows alone, by the rule of `judge`.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd
import yaml

from pipeline.claims import data_driven_learned as learned
from pipeline.claims.figures import NAMES
from pipeline.claims.judge import ALPHA, UNDECIDED, Claim, Judged, Part, judge, plain
from pipeline.claims.page import WORDS, answered, effect, number, triple
from pipeline.claims.programs import commit, exit_code, run_as_program, run_programs, study_program
from pipeline.claims.results import Findings, read_rows, read_run, write_rows
from pipeline.report import style
from pipeline.report.page import svg_of

STUDY = Path("configs/studies/data_driven.yaml")
PAGE = Path("docs/data_driven.md")
NAME = "data_driven"
STUDIES = {NAME: STUDY, learned.NAME: learned.STUDY}
SEES_DATA = ("regmean", "lot", "fisher")
Strategy = tuple[str, str, str]
"""Initialization, deployment, technique."""
OFFLINE, OF_CHAIN, FOLD, BASE_FOLD, STARTS, STARTS_ALL = (
    ("base", "all"), ("latest", "all"), ("latest", "ema"), ("base", "ema"), ("ema", "ema"), ("ema", "all"),
)  # fmt: skip
ZERO: Strategy = ("base", "base", "-")
TUNED_ON: Strategy = ("latest", "latest", "-")
BEST_IN_TIME: Strategy = ("ema", "ema", "average")


def scores(found: Findings, strategy: Strategy, replay: bool, metric: str = "gm") -> pd.Series:
    """Final scores by order. Zero-shot has no replay: it is the same with and without."""
    init, deploy, technique = strategy
    where: dict[str, Any] = {"init": init, "deploy": deploy, "technique": technique}
    if strategy != ZERO:
        where["replay"] = replay
    rows = found.final(NAME, **where).drop_duplicates("replicate")
    return rows.set_index("replicate")[metric].sort_index()


def gain(
    found: Findings, one: Strategy, other: Strategy, replay: bool | None, metric: str = "gm"
) -> pd.Series:
    """`one` above `other` in every order, with replay or without, or the mean of both."""
    halves = [replay] if replay is not None else [False, True]
    return sum(
        scores(found, one, half, metric) - scores(found, other, half, metric) for half in halves
    ) / len(halves)


def question(found: Findings, key: str, says: str, one: Strategy, other: Strategy) -> list[Part]:
    """The mean over both settings of replay decides; each of them, and KA and ZS, stand beside."""
    return [
        Part(key, f"{says}, mean of with and without replay", gain(found, one, other, None)),
        Part(f"{key}_no_replay", f"{says}, without replay", gain(found, one, other, False), beside=True),
        Part(f"{key}_replay", f"{says}, with replay", gain(found, one, other, True), beside=True),
        Part(f"{key}_ka", f"{says}, in KA, mean of both", gain(found, one, other, None, "ka"), beside=True),
        Part(f"{key}_zs", f"{says}, in ZS, mean of both", gain(found, one, other, None, "zs"), beside=True),
    ]


def beside(found: Findings, pairs: Sequence[tuple[Strategy, Strategy]]) -> list[Part]:
    """Comparisons that explain and decide nothing, each as the mean of both settings of replay."""
    return [
        Part(f"{named(one)} above {named(other)}", f"{named(one)} above {named(other)}", gain(found, one, other, None), beside=True)
        for one, other in pairs
    ]  # fmt: skip


def claims_of(found: Findings) -> tuple[Claim, ...]:
    """The five questions."""

    def of(cell: tuple[str, str], technique: str) -> Strategy:
        return (*cell, technique)

    offline = [of(OFFLINE, name) for name in ("lot", "fisher", "wudi", "tsv_m", "ties")]
    return (
        Claim("D1", "Data improves the merge of experts that were trained apart", "offline merging", (
            *question(found, "offline", "RegMean above averaging (base → all)", of(OFFLINE, "regmean"), of(OFFLINE, "average")),
            *beside(found, [(one, of(OFFLINE, "average")) for one in offline]),
            *beside(found, [(of(OFFLINE, "regmean"), one) for one in (of(OFFLINE, "ties"), of(OFFLINE, "wudi"), ZERO, TUNED_ON)]),
        )),
        Claim("D2", "Data improves serving a merge of all experts of one chain", "deploy: all", (
            *question(found, "chain", "RegMean above averaging (latest → all)", of(OF_CHAIN, "regmean"), of(OF_CHAIN, "average")),
            *beside(found, [(of(OF_CHAIN, name), of(OF_CHAIN, "average")) for name in ("fisher", "ties")]),
            *beside(found, [(of(OF_CHAIN, "regmean"), TUNED_ON)]),
        )),
        Claim("D3", "Data improves a moving average of what is served", "an EMA fold", (
            *question(found, "fold", "RegMean's fold above that of averaging (latest → ema)", of(FOLD, "regmean"), of(FOLD, "average")),
            *beside(found, [(of(FOLD, "fisher"), of(FOLD, "average")), (of(BASE_FOLD, "regmean"), of(BASE_FOLD, "average"))]),
        )),
        Claim("D4", "Experts that start from a RegMean state learn and keep more", "initialization", (
            *question(found, "start", "ema → ema by RegMean above the same by averaging", of(STARTS, "regmean"), BEST_IN_TIME),
            *beside(found, [(of(STARTS_ALL, "regmean"), of(STARTS_ALL, "average"))]),
        )),
        Claim("D5", "With data the best strategy is better than without", "the best single strategies", (
            *question(found, "best", "ema → ema by RegMean above continual fine-tuning", of(STARTS, "regmean"), TUNED_ON),
            *beside(found, [(of(STARTS, "regmean"), one) for one in (ZERO, of(FOLD, "average"), of(OFFLINE, "ties"))]),
        )),
    )  # fmt: skip


def named(strategy: Strategy) -> str:
    """A strategy in words: `ema → ema, regmean`."""
    init, deploy, technique = strategy
    return NAMES[f"{init}/{deploy}"] if technique == "-" else f"{init} → {deploy} {technique}"


def page(judged: Sequence[Judged], found: Findings, run: dict[str, Any], more: Sequence[str] = ()) -> str:
    """The whole page in Markdown; `more` are the lines of the second study."""
    rows = [
        f"| [{one.claim.number}](#{one.claim.number.lower()}) | {one.claim.claim} | **{one.verdict}** | {one.settled_by.says} | {effect(one.settled_by)} |"
        for one in judged
    ]
    own = found.final(NAME)
    orders, tasks = own["replicate"].nunique(), int(own["tasks"].iloc[0])
    return "\n".join(
        [
            "# What does data buy?",
            "",
            "<!-- written by `make data-driven`; do not edit -->",
            "",
            "Some techniques [measure each expert](statistics.md) on images of its own task. This page says what that gained in one small study, beside",
            "averaging, TIES, two techniques of the same kind that see no data (`wudi`, `tsv_m`) and continual fine-tuning.",
            "",
            f"**Size.** It was chosen for the time that was there, before any score was seen: a CLIP model of 1.68 million weights, {tasks} tasks of mixed",
            f"classes of the `mini` suite, {run['steps_per_task']} steps of 64 per task at learning rate 3e-4, {run['examples']} images of its task to measure an expert, and {orders} orders",
            "of the tasks, with TIME's replay mixture (.33/.34/.33) and without replay. Every technique has its default parameters, every fold",
            "weight .5; nothing was tuned. So this says nothing about large models, long training or tuned techniques.",
            "",
            f"**Budget.** All strategies train equally long. Measuring comes on top: {run['measuring']:.1%} of all GFLOPs of the study.",
            "",
            _short(judged, found),
            "",
            *(("[Learned merges, TATR and MaTS](#learned-merges-tatr-and-mats) have a study and five questions of their own, below.", "") if more else ()),
            "| | question | verdict | settled by | effect [95 % interval] |",
            "|---|---|---|---|---|",
            *rows,
            "",
            "Effects are differences of final GM (the geometric mean of KA, what was learned, and ZS, what was kept; fractions). Positive speaks for data.",
            "",
            *(f"- **{word}**: {meaning}." for word, meaning in WORDS.items()),
            "",
            f"The rule is that of [the reproduction](reproduction.md): {len(judged)} comparisons decide, chosen before the study ran, and a verdict counts if *p* (after",
            f"Holm) is at most {ALPHA:.2f}. What stands in brackets explains and decides nothing. Intervals are Student's t over {orders} orders, so only",
            "differences that are nearly the same in every order can be told from luck; *undecided* is then not *no effect*.",
            "",
            f"![Final GM of every strategy and technique; points are orders, ticks their mean]({NAME}/gm.svg)",
            "",
            "*Final GM of every strategy and technique; points are orders, ticks their mean.*",
            "",
            *(line for one in judged for line in answered(one, "##")),
            "## All scores",
            "",
            "Means over the orders, after the last task.",
            "",
            "| init → deploy | technique | KA / ZS / GM without replay | KA / ZS / GM with replay |",
            "|---|---|---|---|",
            *_scores(found),
            "",
            *more,
            "## What was not tried",
            "",
            f"{'' if more else 'Learned merges, `tatr`, `mats`, '}`regmean_plus`, other numbers of images and of steps of learning, other weights of folds, other sizes",
            "of model, and other bases. The mini suite's tasks are small pictures of few classes.",
            "",
            "## How this was made",
            "",
            "```sh",
            "make data-driven    # goes on where it stopped",
            "```",
            "",
            f"Study: `{STUDY}` at commit `{own['commit'].iloc[0]}`, {run['machine']}. Numbers of all {len(own)} trajectories: [rows]({NAME}/{NAME}.csv);",
            f"verdicts: [questions]({NAME}/questions.json). `python -m pipeline.claims.data_driven --judge` makes page and verdicts of the rows alone.",
            "",
        ]
    )  # fmt: skip


def _short(judged: Sequence[Judged], found: Findings) -> str:
    """The outcome in one paragraph, beside what replay is worth in the same study."""
    decided = [one for one in judged if one.verdict != UNDECIDED]
    effects = sorted(one.settled_by.mean for one in judged)
    worth = [
        number(float((scores(found, one, True) - scores(found, one, False)).mean()))
        for one in ((*OFFLINE, "average"), TUNED_ON)
    ]
    return (
        f"**In short.** {len(decided) or 'None'} of the {len(judged)} questions {'is' if len(decided) < 2 else 'are'} decided. The effects lie "
        f"between {number(effects[0])} and {number(effects[-1])}. For comparison, replay is worth {worth[0]} to the offline average and {worth[1]} "
        "to continual fine-tuning in the same study."
    )


def _scores(found: Findings) -> list[str]:
    lines = []
    for init, deploy, technique in strategies(found):
        texts = []
        for replay in (False, True):
            means = [
                scores(found, (init, deploy, technique), replay, metric).mean()
                for metric in ("ka", "zs", "gm")
            ]
            texts.append(triple(means))
        lines.append(f"| {init} → {deploy} | {technique} | {texts[0]} | {texts[1]} |")
    return lines


def strategies(found: Findings) -> list[Strategy]:
    """Those that the rows hold, in their order."""
    rows = found.final(NAME)[["init", "deploy", "technique"]].drop_duplicates()
    return [(str(a), str(b), str(c)) for a, b, c in rows.itertuples(index=False)]


def figure(found: Findings) -> str:
    """Final GM of every strategy and technique as SVG, a panel without replay and one with."""
    frames = [
        pd.DataFrame({
            "strategy": named(one), "gm": scores(found, one, replay), "replay": "with replay" if replay else "without replay",
            "data": "sees data" if one[2] in SEES_DATA else "sees none",
        })
        for one in strategies(found) for replay in (False, True)
    ]  # fmt: skip
    rows = pd.concat(frames, ignore_index=True)
    order = list(rows.groupby("strategy")["gm"].mean().sort_values(ascending=False).index)
    x = alt.X("gm:Q", title="GM of KA and ZS", scale=alt.Scale(zero=False))
    y = alt.Y("strategy:N", sort=order, title=None, axis=alt.Axis(labelLimit=260, labelFontSize=9))
    colour = alt.Color(
        "data:N", title=None, scale=alt.Scale(domain=["sees data", "sees none"], range=style.COLOURS[:2])
    )
    dots = alt.Chart(rows).mark_point(filled=True, size=18, opacity=0.6).encode(x, y, colour)
    means = alt.Chart(rows).mark_tick(color="#000000", thickness=2).encode(alt.X("mean(gm):Q"), y)
    chart = (
        alt.layer(dots, means)
        .properties(width=250, height=13 * len(order))
        .facet(column=alt.Column("replay:N", title=None))
    )
    return str(svg_of(chart.to_dict()))


def write(folder: Path, target: Path) -> list[str]:
    """Judge the rows in `folder` and write the page with its figure beside; returns a line per question. Raises UserError."""
    found = read_rows(folder, [*STUDIES])
    judged, more, also = judge(claims_of(found)), list[str](), tuple[Judged, ...]()
    (folder / "gm.svg").write_text(figure(found), encoding="utf-8")
    _answer(folder / "questions.json", judged)
    if found.has(learned.NAME):
        also = judge(learned.claims_of(found))
        _answer(folder / f"{learned.NAME}_questions.json", also)
        more = learned.section(also, found, _run(folder, learned.NAME))
    target.write_text(page(judged, found, _run(folder, NAME), more), encoding="utf-8")
    return [f"{one.claim.number} {one.verdict}: {one.claim.claim}" for one in (*judged, *also)]


def _answer(file: Path, judged: Sequence[Judged]) -> None:
    answer = {one.claim.number: plain(one) for one in judged}
    file.write_text(json.dumps(answer, indent=1) + "\n", encoding="utf-8")


def _run(folder: Path, name: str) -> dict[str, Any]:
    said: dict[str, Any] = json.loads(_run_file(folder, name).read_text(encoding="utf-8"))
    return said


def _run_file(folder: Path, name: str) -> Path:
    return folder / ("run.json" if name == NAME else f"{name}_run.json")


def keep(out: Path, folder: Path, name: str, commit: str) -> None:
    """The rows of a finished run of a study, and what the page says of the run. Raises UserError if it is not finished."""
    study = yaml.safe_load(STUDIES[name].read_text(encoding="utf-8"))
    write_rows(folder, read_run(out, name, commit))
    said = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", "plan", str(STUDIES[name]), "--json"], capture_output=True, text=True, check=True
    )  # fmt: skip
    plan = json.loads(said.stdout)
    run = {
        "steps_per_task": study["budget"]["steps_per_task"], "examples": study["statistics"]["examples"],
        "measuring": plan["gflops_measuring"] / plan["gflops"], "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }  # fmt: skip
    if "learning" in study:
        run |= {
            "learning_steps": study["learning"]["steps"],
            "learning": plan["gflops_learning"] / plan["gflops"],
        }
    _run_file(folder, name).write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Exit code 2 on a UserError."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.claims.data_driven", description=__doc__.partition("\n")[0])  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs"), help="the folder in which each study has its own (default: %(default)s)")  # fmt: skip
    parser.add_argument("--only", choices=[*STUDIES], help="run or keep this study alone")
    parser.add_argument("--keep", metavar="COMMIT", help="keep the rows of runs in OUT that this commit made; run nothing")  # fmt: skip
    parser.add_argument(
        "--judge", action="store_true", help="page and verdicts from the kept rows; run nothing"
    )
    options = parser.parse_args(arguments)
    return exit_code(lambda: _judged(options))


def _judged(options: argparse.Namespace) -> list[str]:
    """Run what the options ask for, keep its rows, write the page; returns a line per question. Raises UserError."""
    folder = PAGE.with_suffix("")
    for name in () if options.judge else (options.only,) if options.only else STUDIES:
        if not options.keep:
            run_programs(study_program(f"study {name}", STUDIES[name], options.out / name))
        keep(options.out / name, folder, name, options.keep or commit())
    return write(folder, PAGE)


if __name__ == "__main__":
    sys.exit(run_as_program(main))
