"""How a claim is judged: an interval per comparison, one of four verdicts, and a correction for the number of comparisons.

A comparison asks whether an effect lies above its `bar` (0 by default). By the interval of the mean over replicates it is

- *equivalent* if the whole interval lies within `margin` of the bar (a difference too small to count, whatever its sign)
- else *holds* if the interval lies above the bar, and *refuted* if it lies below
- else *undecided*: the bar is inside

The bar of an ordering is 0 and not the margin, because the paper claims orderings; the size is shown beside. A claim needs all of
its comparisons, in any order: it has the worst verdict among them, from refuted over equivalent and undecided to holds (an
intersection-union test).

Multiplicity: Holm over all comparisons that decide some claim. The most certain of m is judged by its interval at 1 - .05/m, the
next at 1 - .05/(m-1), and so on until the first that stays undecided; those after it stay undecided too. Every wrong verdict
needs an interval that misses its effect, so the chance of any wrong one on a page is about .05 at most.

Invariant: pure functions; the rule depends on neither claim nor strategy. One replicate, or replicates without any spread, decide
nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats

REFUTED, EQUIVALENT, UNDECIDED, HOLDS = VERDICTS = ("refuted", "equivalent", "undecided", "holds")
"""From worst to best for a claim."""
ALPHA = 0.05
POINT = 0.01
"""The least difference in KA, ZS or GM that counts: one point."""


@dataclass(frozen=True)
class Part:
    """One comparison: `values` (one per replicate) above `bar` support the claim; within `margin` of it they are no difference.

    `margin` 0 means that no difference is too small (shares, ranks). `step` is the distance between two possible values of the
    effect, if it is discrete (ranks): the spread is then at least that of rounding to it. Parts that are `beside` affect no
    verdict. `key` names the part within its claim.
    """

    key: str
    says: str
    values: pd.Series
    bar: float = 0.0
    margin: float = POINT
    beside: bool = False
    step: float = 0.0

    @property
    def mean(self) -> float:
        return float(self.values.mean())

    @property
    def error(self) -> float:
        """The standard error of the mean; NaN for one replicate, and if all are equal, because the spread is then unknown."""
        if len(self.values) < 2:
            return math.nan
        spread = max(float(self.values.std(ddof=1)), self.step / math.sqrt(12))
        return spread / math.sqrt(len(self.values)) if spread > 1e-12 else math.nan

    def half_width(self, alpha: float = ALPHA) -> float:
        """Half of the interval of the mean at 1 - alpha (Student's t); NaN without one."""
        return float(stats.t.ppf(1 - alpha / 2, len(self.values) - 1)) * self.error

    @property
    def alone(self) -> str:
        """The verdict by the plain 95 % interval, without correction for other comparisons."""
        return verdicts([self])[0][0]


@dataclass(frozen=True)
class Claim:
    """A claim, the paper's words (`paper`), its comparisons, and sentences with numbers that belong to it."""

    number: str
    claim: str
    paper: str
    parts: tuple[Part, ...]
    facts: tuple[str, ...] = ()

    @property
    def deciding(self) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if not part.beside)


@dataclass(frozen=True)
class Judged:
    """A claim with the verdict of each deciding part and its p after Holm, both in the order of `claim.deciding`."""

    claim: Claim
    verdicts: tuple[str, ...]
    p: tuple[float, ...]

    @property
    def verdict(self) -> str:
        """The worst verdict of its parts."""
        return min(self.verdicts, key=VERDICTS.index)

    @property
    def settled_by(self) -> Part:
        """The part with the verdict of the claim: the most certain of those that fail, else the least certain one."""
        same = [place for place, verdict in enumerate(self.verdicts) if verdict == self.verdict]
        pick = min if self.verdict in (REFUTED, EQUIVALENT) else max
        return self.claim.deciding[pick(same, key=lambda place: self.p[place])]


def judge(claims: Sequence[Claim]) -> tuple[Judged, ...]:
    """Judge all claims of a page; their deciding parts are one family."""
    family = [part for claim in claims for part in claim.deciding]
    found, p = verdicts(family)
    answer, at = [], 0
    for claim in claims:
        end = at + len(claim.deciding)
        answer.append(Judged(claim, tuple(found[at:end]), tuple(p[at:end])))
        at = end
    return tuple(answer)


def verdicts(family: Sequence[Part]) -> tuple[list[str], list[float]]:
    """The verdict of each part and its p after Holm; the parts are one family."""
    codes, p = decide(
        [part.mean for part in family], [part.error for part in family], [len(part.values) - 1 for part in family],
        [part.bar for part in family], [part.margin for part in family],
    )  # fmt: skip
    return [VERDICTS[code] for code in codes], [float(value) for value in p]


def decide(
    mean: ArrayLike, error: ArrayLike, freedom: ArrayLike, bar: ArrayLike, margin: ArrayLike
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Codes into `VERDICTS` and Holm's p of families of effects, the last axis being the family.

    `mean` and `error` are the means over replicates and their standard errors (NaN: not known), `freedom` the degrees of freedom. A p is
    the least alpha at which the interval at 1 - alpha decides anything.
    """
    mean, error, freedom, bar, margin = np.broadcast_arrays(
        *(np.asarray(one, dtype=np.float64) for one in (mean, error, freedom, bar, margin))
    )
    above = 2 * _tail(bar - mean, error, freedom)
    below = 2 * _tail(mean - bar, error, freedom)
    within = 2 * np.maximum(
        _tail(mean - bar - margin, error, freedom), _tail(bar - margin - mean, error, freedom)
    )
    within = np.where(margin > 0, within, 1.0)
    least = np.minimum(np.minimum(np.minimum(above, below), within), 1.0)
    as_small = least[..., None, :] <= least[..., :, None]  # [..., i, j]: j is at least as certain as i
    left = as_small.sum(
        axis=-2
    )  # how many are no more certain than j; of equal ones all count, so their order does not
    p = np.minimum(np.where(as_small, (least * left)[..., None, :], 0.0).max(axis=-1), 1.0)
    level = ALPHA / left
    code = np.select(
        [p > ALPHA, within <= level, above <= level],
        [VERDICTS.index(UNDECIDED), VERDICTS.index(EQUIVALENT), VERDICTS.index(HOLDS)],
        VERDICTS.index(REFUTED),
    )
    return code, p


def _tail(
    distance: NDArray[np.float64], error: NDArray[np.float64], freedom: NDArray[np.float64]
) -> NDArray[np.float64]:
    """P(T <= distance / error), small where `distance` is far below 0; 1 where the error is not known."""
    known = np.isfinite(error) & (error > 0) & (freedom > 0)
    scale, degrees = np.where(known, error, 1.0), np.where(known, freedom, 1.0)
    return np.where(known, stats.t.cdf(distance / scale, degrees), 1.0)


def plain(one: Judged) -> dict[str, Any]:
    """As JSON, all digits; missing numbers are null."""
    decided = dict(
        zip((part.key for part in one.claim.deciding), zip(one.verdicts, one.p, strict=True), strict=True)
    )
    parts = []
    for part in one.claim.parts:
        verdict, p = decided.get(part.key, (part.alone, None))
        half = part.half_width()
        parts.append(
            {
                "key": part.key, "says": part.says, "verdict": verdict, "bears_on_the_verdict": not part.beside,
                "effect": part.mean, "half_width": None if math.isnan(half) else half, "p": p, "bar": part.bar,
                "margin": part.margin, "values": {str(k): float(v) for k, v in part.values.items()},
            }
        )  # fmt: skip
    return {
        "claim": one.claim.claim,
        "verdict": one.verdict,
        "settled_by": one.settled_by.key,
        "parts": parts,
    }


def shares(cells: pd.DataFrame, value: str, rows: str, columns: str) -> dict[str, float]:
    """The shares of the variance of a full two-way table: {rows, columns, interplay}, with sum 1.

    Sums of squares of the main effects and of the rest, over the total (a balanced two-way analysis of variance with one
    observation a cell). Raises ValueError on a table with a gap or without variance.
    """
    table = cells.pivot(index=rows, columns=columns, values=value)
    if table.isna().to_numpy().any():
        raise ValueError(f"{rows} x {columns} has gaps, so its variance cannot be shared out")
    grand = float(table.to_numpy().mean())
    total = float(((table - grand) ** 2).to_numpy().sum())
    if total == 0:
        raise ValueError(f"{rows} x {columns} does not vary")
    by_row = table.shape[1] * float(((table.mean(axis=1) - grand) ** 2).sum()) / total
    by_column = table.shape[0] * float(((table.mean(axis=0) - grand) ** 2).sum()) / total
    return {rows: by_row, columns: by_column, "interplay": 1 - by_row - by_column}


def kept_order(short: pd.Series, long: pd.Series, groups: Sequence[Sequence[str]]) -> float:
    """Kendall's tau over the pairs within `groups`: pairs in the same order in both minus pairs in another, over all pairs.

    Equal values count as neither. Raises ValueError if no group has a pair.
    """
    signs = [
        math.copysign(1, (short[one] - short[other]) * (long[one] - long[other]))
        if (short[one] - short[other]) * (long[one] - long[other])
        else 0.0
        for group in groups
        for place, one in enumerate(group)
        for other in group[:place]
    ]
    if not signs:
        raise ValueError("no group has two members")
    return sum(signs) / len(signs)
