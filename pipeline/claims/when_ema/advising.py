"""A test of the advised weight: fitted without a replicate, applied to the replicate's settings, scored on the replicate.

Invariant: a tested replicate has no part in the function that is tested on it, nor in the constant that it is compared with.
"""

import numpy as np
import pandas as pd

from pipeline.claims.when_ema import measures
from pipeline.claims.when_ema.advice import Advice, fit, nearest_of
from pipeline.claims.when_ema.measures import EE, FT, UNIT
from pipeline.claims.when_ema.numbers import Numbers

CELL = [*UNIT, "lr"]


def fitted(core: Numbers) -> Advice | None:
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


def _fit(best: pd.DataFrame) -> Advice | None:
    try:
        return fit(best["drift"], best["share"], best["best"])
    except ValueError:
        return None
