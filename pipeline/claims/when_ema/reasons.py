"""Why averaging gains or does not: records of the experts, beside the gain. Descriptions; no verdict depends on them.

Invariant: functions of kept numbers alone.
"""

import numpy as np
import pandas as pd

from pipeline.claims.when_ema import measures
from pipeline.claims.when_ema.figures import summary
from pipeline.claims.when_ema.measures import EE, LE, UNIT
from pipeline.claims.when_ema.numbers import Numbers

SAYS = {
    "log_drift": "drift of a task (log)",
    "distance": "distance between consecutive experts",
    "cosine": "cosine of consecutive task vectors",
    "forgotten": "rise of the old loss over a task",
    "spared": "what half the way spares of it",
    "learned": "fall of the new loss over a task",
    "early": "what half the way has of it beyond its half",
    "grad_last": "gradient norm at the end of a task",
}
"""The measures that are correlated with the gain, by column."""


def correlations(core: Numbers) -> pd.DataFrame:
    """`measure`, `mean` and `half` (95 % over replicates) of the correlation with the gain over shares and rates, per replicate."""
    rows = measures.with_drift(
        measures.gains(measures.chosen(measures.endpoints(core), ["lr"]), by=["lr"]), core
    )
    rows = rows.merge(measures.curvatures(core), on=[*UNIT, "lr"])
    rows["log_drift"] = np.log10(rows["drift"])
    found = [
        {"measure": name, "replicate": replicate, "r": mine[name].corr(mine["gain"])}
        for replicate, mine in rows.groupby("replicate")
        for name in SAYS
    ]
    return summary(pd.DataFrame(found), "r", ["measure"])


def by_share(core: Numbers) -> pd.DataFrame:
    """`share`, and means over rates, tasks and replicates: drift, forgotten, spared, and `bend_le`, `bend_ee` of `measures.bends`."""
    rows = measures.curvatures(core).merge(measures.drifts(core), on=[*UNIT, "lr"])
    table = rows.groupby("share")[["drift", "forgotten", "spared"]].mean()
    bends = measures.bends(core).groupby(["arm", "share"])["bend"].mean()
    return table.assign(bend_le=bends.get(LE), bend_ee=bends.get(EE)).reset_index()


def settings(numbers: Numbers) -> pd.DataFrame:
    """A row per piece: its setting, its number of replicates, tuned gains of Best-in-TIME (`ee`) and latest -> ema (`le`), mean
    drift.
    """
    picks = measures.chosen(measures.endpoints(numbers))
    rows = measures.gains(picks).rename(columns={"gain": "ee"})
    rows = rows.merge(measures.gains(picks, arm=LE).rename(columns={"gain": "le"}), on=UNIT)
    by = [name for name in UNIT if name != "replicate"]
    tables = [
        summary(rows, name, by).rename(columns={"mean": name, "half": f"{name}_half"})[
            [*by, name, f"{name}_half", "count"]
        ]
        for name in ("ee", "le")
    ]
    drift = measures.drifts(numbers).groupby("piece")["drift"].mean().reset_index()
    return tables[0].merge(tables[1].drop(columns="count"), on=by).merge(drift, on="piece")
