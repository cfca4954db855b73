"""How a claim is judged: effects per replicate, their interval, and one rule for the verdict.

The rule is about direction and size: a part *holds* if its effect is positive in every replicate and on average at least its
margin, *does not hold* if it is on average not positive, and else *holds weakly*. How sure that is, the interval says. Invariant:
pure functions; the rule is the same for every claim and every strategy.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from pipeline.report.analysis import half_width

HOLDS, WEAKLY, NOT = "holds", "holds weakly", "does not hold"
POINT = 0.01
"""The least difference in KA, ZS or GM that counts: one point."""


@dataclass(frozen=True)
class Part:
    """One comparison: positive `values` (per replicate) speak for the claim. Parts that only stand `beside` bear on no verdict."""

    says: str
    values: pd.Series
    margin: float = POINT
    beside: bool = False

    @property
    def mean(self) -> float:
        return float(self.values.mean())

    @property
    def half_width(self) -> float:
        """Half of the 95 % interval of the mean over replicates (Student's t); NaN for a single one."""
        return half_width(float(self.values.std(ddof=1)), len(self.values))

    @property
    def verdict(self) -> str:
        if self.mean <= 0:
            return NOT
        return HOLDS if self.mean >= self.margin and bool((self.values > 0).all()) else WEAKLY


@dataclass(frozen=True)
class Judged:
    """A claim with its parts, the main one first."""

    number: str
    claim: str
    paper: str
    parts: tuple[Part, ...]
    facts: tuple[str, ...] = field(default=())

    @property
    def verdict(self) -> str:
        """Holds if all parts do, does not hold if the main part does not, else holds weakly."""
        verdicts = [part.verdict for part in self.parts if not part.beside]
        if verdicts[0] == NOT:
            return NOT
        return HOLDS if set(verdicts) == {HOLDS} else WEAKLY

    def plain(self) -> dict[str, Any]:
        """As JSON, all digits."""
        return {
            "claim": self.claim,
            "verdict": self.verdict,
            "parts": [
                {
                    "says": part.says, "verdict": part.verdict, "bears_on_the_verdict": not part.beside,
                    "effect": part.mean, "interval": None if math.isnan(part.half_width) else part.half_width,
                    "margin": part.margin, "values": {str(k): float(v) for k, v in part.values.items()},
                }
                for part in self.parts
            ],
        }  # fmt: skip


def shares(cells: pd.DataFrame, value: str, rows: str, columns: str) -> dict[str, float]:
    """How the variance of a full two-way table is shared out: {rows, columns, interplay}, of a sum of 1.

    Sums of squares of the main effects and of what is left, over the total (a balanced two-way analysis of variance with
    one observation a cell). Raises ValueError on a table with a gap or with no variance.
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
