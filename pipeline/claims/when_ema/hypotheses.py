"""H1 to H4 by the rule that was written before the study was run (configs/studies/when_ema/README.md).

The verdict of a comparison comes from `pipeline.claims.judge`; this module defines the comparisons of each hypothesis and their
families.

Invariant: a function of kept numbers alone, the same for one replicate and for eight.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from pipeline.claims.judge import EQUIVALENT, HOLDS, REFUTED, UNDECIDED, VERDICTS, Part, verdicts
from pipeline.claims.when_ema import measures
from pipeline.claims.when_ema.measures import EE, EL, END, FT, LE, ZERO
from pipeline.claims.when_ema.numbers import Numbers

MARGIN, WEIGHT_MARGIN = 0.005, 0.05
WEIGHT_STEP = 0.01
"""About the change of a slope of best weights when one cell takes the next weight of the grid."""


@dataclass(frozen=True)
class Answer:
    """A comparison with its verdict, within its family if it has one."""

    part: Part
    verdict: str


@dataclass(frozen=True)
class Hypothesis:
    """One of H1 to H4, its answers (those that decide, then those beside), and its verdict."""

    name: str
    says: str
    deciding: tuple[Answer, ...]
    beside: tuple[Answer, ...]
    verdict: str


@dataclass(frozen=True)
class Judgement:
    """The verdicts of the core: the hypotheses, and the gain at each share (family A).

    `above_base` is Best-in-TIME less zero-shot at each share, by plain intervals: a gain over fine-tuning may be a smaller loss.
    """

    hypotheses: tuple[Hypothesis, ...]
    gains: tuple[Answer, ...]
    above_base: tuple[Answer, ...]
    shares: tuple[float, ...]
    replicates: tuple[int, ...]

    def gain_at(self, share: float) -> Answer:
        return self.gains[self.shares.index(share)]


def judge_all(core: Numbers) -> Judgement:
    """Judge all hypotheses on the complete replicates of the core."""
    ends = measures.endpoints(core)
    shares = tuple(sorted(float(share) for share in ends["share"].unique()))
    picks = measures.chosen(ends)
    tuned, over_base = measures.gains(picks), measures.gains(picks, over=ZERO)
    family_a = [
        Part(
            f"gain_{share:g}", f"gain at a share of {share:g}", measures.of_share(tuned, share), margin=MARGIN
        )
        for share in shares
    ]
    at_rates = measures.with_drift(measures.gains(measures.chosen(ends, ["lr"]), by=["lr"]), core)
    weights = measures.with_drift(measures.best_weights(ends), core)
    family_b = [
        Part("fall", "fall of the gain from the lowest to the highest share", -measures.by_share(tuned, "gain"), margin=MARGIN),
        Part("rise", "rise of the gain per tenfold drift", measures.by_drift(at_rates, "gain"), margin=MARGIN),
        Part("weight_by_drift", "fall of the best weight per tenfold drift", -measures.by_drift(weights, "best"), margin=WEIGHT_MARGIN, step=WEIGHT_STEP),
        Part("weight_by_share", "rise of the best weight from the lowest to the highest share", measures.by_share(weights, "best", "lr"), margin=WEIGHT_MARGIN, step=WEIGHT_STEP),
    ]  # fmt: skip
    gains, slopes = answered(family_a), answered(family_b)
    hypotheses = (
        _h1(slopes[0], gains, ends, shares),
        _hypothesis("H2", "The gain rises with drift", [slopes[1]], _h2_beside(ends, core)),
        _h3(ends, shares),
        _hypothesis("H4", "The best weight falls with drift and rises with replay", slopes[2:], []),
    )
    replicates = tuple(sorted(int(one) for one in ends["replicate"].unique()))
    above_base = tuple(
        beside(f"base_{share:g}", f"Best-in-TIME less zero-shot at a share of {share:g}", measures.of_share(over_base, share))
        for share in shares
    )  # fmt: skip
    return Judgement(hypotheses, tuple(gains), above_base, shares, replicates)


def answered(family: Sequence[Part]) -> list[Answer]:
    """Each part with its verdict; the parts are one family for Holm."""
    return [Answer(part, verdict) for part, verdict in zip(family, verdicts(family)[0], strict=True)]


def mirrored(answer: Answer) -> Answer:
    """The same comparison with the opposite sign: what held is refuted."""
    part = answer.part
    turned = Part(part.key, f"loss{part.says.removeprefix('gain')}", -part.values, margin=part.margin)
    return Answer(turned, {HOLDS: REFUTED, REFUTED: HOLDS}.get(answer.verdict, answer.verdict))


def beside(key: str, says: str, values: pd.Series, margin: float = MARGIN) -> Answer:
    """A comparison by its plain interval, which affects no verdict."""
    part = Part(key, says, values, margin=margin, beside=True)
    return Answer(part, part.alone)


def _hypothesis(name: str, says: str, deciding: Sequence[Answer], others: Sequence[Answer]) -> Hypothesis:
    worst = min((answer.verdict for answer in deciding), key=VERDICTS.index)
    return Hypothesis(name, says, tuple(deciding), tuple(others), worst)


def _h1(fall: Answer, gains: Sequence[Answer], ends: pd.DataFrame, shares: Sequence[float]) -> Hypothesis:
    at_end = measures.gains(measures.chosen(ends), score=END)
    others = [
        beside("fall_end", "fall of the gain, GM at the end", -measures.by_share(at_end, "gain")),
        *(beside(f"end_{share:g}", f"gain at a share of {share:g}, GM at the end", measures.of_share(at_end, share)) for share in shares),
    ]  # fmt: skip
    deciding = [fall, gains[0], mirrored(gains[-1])]
    return _hypothesis("H1", "The gain falls as the share of replay rises and changes sign", deciding, others)


def _h2_beside(ends: pd.DataFrame, core: Numbers) -> list[Answer]:
    at_end = measures.gains(measures.chosen(ends, ["lr"]), score=END, by=["lr"])
    rows = measures.with_drift(at_end, core)
    return [
        beside(
            "rise_end", "rise of the gain per tenfold drift, GM at the end", measures.by_drift(rows, "gain")
        )
    ]


def _h3(ends: pd.DataFrame, shares: Sequence[float]) -> Hypothesis:
    """Equivalence at every share, each by its plain interval; a departure beyond the margin is one of ten comparisons."""
    picks = measures.chosen(ends)
    apart = measures.gains(picks, arm=LE, over=EE)
    values = {share: measures.of_share(apart, share) for share in shares}
    deciding = [
        beside(f"apart_{share:g}", f"latest → ema less Best-in-TIME at a share of {share:g}", series)
        for share, series in values.items()
    ]
    beyond = [
        Part(f"beyond_{sign:+d}_{share:g}", "", sign * series, bar=MARGIN, margin=0.0)
        for share, series in values.items()
        for sign in (1, -1)
    ]
    if all(answer.verdict == EQUIVALENT for answer in deciding):
        verdict = HOLDS
    else:
        verdict = REFUTED if HOLDS in verdicts(beyond)[0] else UNDECIDED
    init = measures.gains(picks, arm=EL, over=FT)
    others = [
        beside(
            f"init_{share:g}",
            f"ema → latest less fine-tuning at a share of {share:g}",
            measures.of_share(init, share),
        )
        for share in shares
    ]
    says = "Deployment does it, not initialization: latest → ema equals Best-in-TIME within .005"
    return Hypothesis("H3", says, tuple(deciding), tuple(others), verdict)
