"""Which weight a new expert should get in a running average, from how far experts drift and how much is replayed.

A function fitted to a study (`docs/when_ema.md`), with the range that it was fitted on. Invariant: a weight lies in (0, 1), falls back to nothing outside
of what was measured only if asked to (`covers`), and the function is plain numbers that survive JSON.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

HIGHEST = 0.975
"""What a best weight of 1 (fine-tuning) counts as: its logit is not finite."""


@dataclass(frozen=True)
class Advice:
    """logit weight = `constant` + `by_drift` * log10 drift + `by_share` * share.

    Drift is the mean over experts of `relative_drift` in their records: the length of the task vector from where training began, over the length of the
    weights it began with. `drifts` and `shares` are the lowest and highest that were measured.
    """

    constant: float
    by_drift: float
    by_share: float
    drifts: tuple[float, float]
    shares: tuple[float, float]

    def weight(self, drift: float, share: float) -> float:
        """The weight of the new expert. Raises ValueError for a drift that is not above 0 or a share outside [0, 1)."""
        if not drift > 0 or not 0 <= share < 1:
            raise ValueError(f"a drift is above 0 and a share in [0, 1), not {drift:g} and {share:g}")
        return _expit(self.constant + self.by_drift * math.log10(drift) + self.by_share * share)

    def covers(self, drift: float, share: float) -> bool:
        """Whether the function was fitted where this lies."""
        return self.drifts[0] <= drift <= self.drifts[1] and self.shares[0] <= share <= self.shares[1]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> "Advice":
        return cls(
            float(body["constant"]), float(body["by_drift"]), float(body["by_share"]),
            (float(body["drifts"][0]), float(body["drifts"][1])), (float(body["shares"][0]), float(body["shares"][1])),
        )  # fmt: skip


def fit(drifts: Sequence[float], shares: Sequence[float], weights: Sequence[float]) -> Advice:
    """The least squares fit to best weights that were measured. Raises ValueError unless both drift and share vary."""
    drift, share = np.asarray(drifts, np.float64), np.asarray(shares, np.float64)
    weight = np.clip(np.asarray(weights, np.float64), 1 - HIGHEST, HIGHEST)
    design = np.column_stack([np.ones_like(drift), np.log10(drift), share])
    if np.linalg.matrix_rank(design) < design.shape[1]:
        raise ValueError("drift and share must both vary, and not together, for a function of both")
    found = np.linalg.lstsq(design, np.log(weight / (1 - weight)), rcond=None)[0]
    constant, by_drift, by_share = map(_rounded, found)
    ranges = (_rounded(drift.min()), _rounded(drift.max())), (float(share.min()), float(share.max()))
    return Advice(constant, by_drift, by_share, *ranges)


def _rounded(value: float) -> float:
    """To six digits: as much as any study decides, and the same on every machine."""
    return float(f"{value:.6g}")


def nearest_of(weight: float, grid: Sequence[float]) -> float:
    """The value of a grid that lies nearest; of two equally near the larger."""
    return min(sorted(grid, reverse=True), key=lambda value: abs(value - weight))


def _expit(value: float) -> float:
    return 1 / (1 + math.exp(-value))
