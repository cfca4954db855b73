"""The advised weight: fitted to best weights, and tested on replicates that had no part in it.

Invariant: a tested replicate has no part in the function that is tested on it, nor in the constant that it is compared with.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from pipeline.claims.when_ema import measures
from pipeline.claims.when_ema.measures import EE, FT, UNIT
from pipeline.claims.when_ema.numbers import Numbers
from pipeline.results.ema_weight import EmaWeight

CELL = [*UNIT, "lr"]
HIGHEST = 0.975
"""What a best weight of 1 (fine-tuning) counts as: its logit is not finite."""


def fitted(core: Numbers) -> EmaWeight | None:
    """The function fitted to all replicates; None unless drift and share both vary."""
    return _fit(measures.with_drift(measures.best_weights(measures.endpoints(core)), core))


def tested(core: Numbers) -> pd.DataFrame:
    """A row per replicate: S averaged over shares and rates of the `advised` weight, the best `constant` one, `own` (chosen on
    its `val`), fine-tuning (1).

    Empty for fewer than two replicates.
    """
    ends = measures.endpoints(core)
    best = measures.with_drift(measures.best_weights(ends), core)
    scores = ends[ends["arm"].isin([EE, FT])]
    table = scores.pivot_table(index=CELL, columns="weight", values=["val", "gm"])
    rows = []
    for replicate in sorted(best["replicate"].unique()) if best["replicate"].nunique() > 1 else ():
        others, mine = best[best["replicate"] != replicate], best[best["replicate"] == replicate]
        advice = _fit(others)
        if advice is None:
            continue
        elsewhere = table[table.index.get_level_values("replicate") != replicate]
        constant = float(elsewhere["val"].mean().idxmax())
        own = table["gm"].loc[[tuple(row) for row in mine[CELL].to_numpy()]]
        grid = [float(weight) for weight in own.columns]
        asked = [
            nearest_of(advice.weight(drift, share), grid)
            for drift, share in zip(mine["drift"], mine["share"], strict=True)
        ]
        at = np.arange(len(own))
        rows.append({
            "replicate": replicate, "advised": own.to_numpy()[at, [grid.index(weight) for weight in asked]].mean(), "constant": own[constant].mean(),
            "own": own.to_numpy()[at, [grid.index(weight) for weight in mine["best"]]].mean(), "fine-tuning": own[1.0].mean(), "constant_weight": constant,
        })  # fmt: skip
    return pd.DataFrame(rows)


def fit(drifts: Sequence[float], shares: Sequence[float], weights: Sequence[float]) -> EmaWeight:
    """The least squares fit to best weights that were measured. Raises ValueError unless both drift and share vary."""
    drift, share = np.asarray(drifts, np.float64), np.asarray(shares, np.float64)
    weight = np.clip(np.asarray(weights, np.float64), 1 - HIGHEST, HIGHEST)
    design = np.column_stack([np.ones_like(drift), np.log10(drift), share])
    if np.linalg.matrix_rank(design) < design.shape[1]:
        raise ValueError("drift and share must both vary, and not together, for a function of both")
    found = np.linalg.lstsq(design, np.log(weight / (1 - weight)), rcond=None)[0]
    constant, by_drift, by_share = map(_rounded, found)
    ranges = (_rounded(drift.min()), _rounded(drift.max())), (float(share.min()), float(share.max()))
    return EmaWeight(constant, by_drift, by_share, *ranges)


def nearest_of(weight: float, grid: Sequence[float]) -> float:
    """The value of a grid that lies nearest; of two equally near the larger."""
    return min(sorted(grid, reverse=True), key=lambda value: abs(value - weight))


def _rounded(value: float) -> float:
    """To six digits: as much as any study decides, and the same on every machine."""
    return float(f"{value:.6g}")


def _fit(best: pd.DataFrame) -> EmaWeight | None:
    try:
        return fit(best["drift"], best["share"], best["best"])
    except ValueError:
        return None
