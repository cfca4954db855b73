"""The second study of `data_driven`: what learned merges, TATR and MaTS gain in offline merging, and a learned fold over time.

Learned merges read images of all tasks so far, so the study has replay alone. Its five questions stand here as they were before it was run.
Invariant: as of `data_driven`, everything is made from the kept rows.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from pipeline.claims.judge import Claim, Judged, Part
from pipeline.claims.page import answered, effect, number, triple
from pipeline.claims.results import Findings

STUDY = Path("configs/studies/data_driven_learned.yaml")
NAME = "data_driven_learned"
Strategy = tuple[str, str, str]
"""Initialization, deployment, technique."""
ZERO, TUNED_ON = ("base", "base", "-"), ("latest", "latest", "-")
FOLD, LEARNED_FOLD = ("latest", "ema", "average"), ("latest", "ema", "adamerging")


def offline(technique: str) -> Strategy:
    """Offline merging by a technique."""
    return "base", "all", technique


def scores(found: Findings, strategy: Strategy, metric: str = "gm") -> pd.Series:
    """Final scores by order."""
    init, deploy, technique = strategy
    return found.metric(NAME, metric, init=init, deploy=deploy, technique=technique)


def claims_of(found: Findings) -> tuple[Claim, ...]:
    """The five questions."""

    def gain(one: Strategy, other: Strategy, metric: str = "gm") -> pd.Series:
        return scores(found, one, metric) - scores(found, other, metric)

    def question(
        number: str, claim: str, where: str, one: Strategy, other: Strategy, more: Sequence[Strategy]
    ) -> Claim:
        says = f"{_named(one)} above {_named(other)}"
        beside = [
            Part(f"{number}_{metric}", f"{says}, in {metric.upper()}", gain(one, other, metric), beside=True)
            for metric in ("ka", "zs")
        ]
        beside += [
            Part(
                f"{number}_{_named(third)}",
                f"{_named(one)} above {_named(third)}",
                gain(one, third),
                beside=True,
            )
            for third in more
        ]
        return Claim(number, claim, where, (Part(number, says, gain(one, other)), *beside))

    average, sums = offline("average"), offline("task_arithmetic")
    return (
        question(
            "L1", "Coefficients learned from unlabelled images improve the merge of all experts", "AdaMerging",
            offline("adamerging"), average, (sums, offline("regmean"), ZERO, TUNED_ON),
        ),
        question(
            "L2", "Coefficients learned from labels are better than those from entropy", "SUPERMERGE",
            offline("supermerge"), offline("adamerging"), (average, sums),
        ),
        question("L3", "A trust region improves task arithmetic", "TATR", offline("tatr"), sums, (average,)),
        question("L4", "Matching in the tasks' subspaces improves on averaging", "MaTS", offline("mats"), average, (offline("regmean"),)),
        question(
            "L5", "A fold with learned factors is better than a moving average", "AdaMerging of two models",
            LEARNED_FOLD, FOLD, (TUNED_ON,),
        ),
    )  # fmt: skip


def section(judged: Sequence[Judged], found: Findings, run: Mapping[str, float]) -> list[str]:
    """The part of the page, in lines of Markdown; `run` has the parts of the GFLOPs that went into learning and measuring."""
    orders, rows = found.final(NAME)["replicate"].nunique(), found.final(NAME)
    return [
        "## Learned merges, TATR and MaTS",
        "",
        f"A second study of the same size ({orders} orders, with replay alone, because [learned merges](learned.md) read images of all tasks so far):",
        f"coefficients are learned in {run['learning_steps']:.0f} steps of 16 images per task at a rate of .01, each time step from those of the one before.",
        f"**Budget.** Training is the same for all. Learning took {run['learning']:.0%} of all GFLOPs of this study, measuring {run['measuring']:.1%}.",
        "",
        _short(found),
        "",
        "| | question | verdict | settled by | effect [95 % interval] |",
        "|---|---|---|---|---|",
        *(
            f"| [{one.claim.number}](#{one.claim.number.lower()}) | {one.claim.claim} | **{one.verdict}** | {one.settled_by.says} | {effect(one.settled_by)} |"
            for one in judged
        ),
        "",
        *(line for one in judged for line in answered(one, "###")),
        "### Scores of this study",
        "",
        "| init → deploy | technique | KA / ZS / GM |",
        "|---|---|---|",
        *_scores(found, rows),
        "",
        f"Study: `{STUDY}` at commit `{rows['commit'].iloc[0]}`. Numbers of all {len(rows)} trajectories: [rows](data_driven/{NAME}.csv);",
        f"verdicts: [questions](data_driven/{NAME}_questions.json).",
        "",
    ]  # fmt: skip


def _short(found: Findings) -> str:
    """Where the learned merge gains and loses, which its verdict on GM alone does not show."""
    one, other = offline("adamerging"), offline("average")
    ka, zs = (
        float((scores(found, one, metric) - scores(found, other, metric)).mean()) for metric in ("ka", "zs")
    )
    return (
        f"**Where the gain is.** Beside averaging, AdaMerging changes KA (what was learned) by {number(ka)} and ZS (what was kept) by {number(zs)}. A merge\n"
        "that stays nearer to the base keeps more. Learned coefficients can do that; so does a smaller `scale`, without learning, and this study has\n"
        "no average and no sum at a smaller scale."
    )


def _scores(found: Findings, rows: pd.DataFrame) -> list[str]:
    lines = []
    for init, deploy, technique in (
        rows[["init", "deploy", "technique"]].drop_duplicates().itertuples(index=False)
    ):
        means = [scores(found, (init, deploy, technique), metric).mean() for metric in ("ka", "zs", "gm")]
        lines.append(f"| {init} → {deploy} | {technique} | {triple(means)} |")
    return lines


def _named(strategy: Strategy) -> str:
    init, deploy, technique = strategy
    return {ZERO: "zero-shot", TUNED_ON: "continual fine-tuning"}.get(
        strategy, f"{init} → {deploy} {technique}"
    )
