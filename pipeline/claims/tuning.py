"""The one rule by which techniques get their parameters: the best final GM of a grid that is the same for all, on a stream of its own.

Each cell (init, deploy, technique, with or without replay) has its own grid point, chosen on a stream that no claim is judged on;
of equal ones the first in the study wins. Invariant: what is not tuned (another cell, another technique) is never judged here.
"""

import pandas as pd

from pipeline.claims.results import Findings

TUNING = ("tuning", "tuning_no_replay")
CELL = ["replay", "init", "deploy", "technique"]


def swept(found: Findings) -> pd.DataFrame:
    """Every point of the grids: `CELL`, params, ka, zs, gm and whether it is the `chosen` one of its cell."""
    rows = pd.concat([found.final(study) for study in TUNING]).drop_duplicates([*CELL, "params"])
    rows = rows[rows["technique"] != "-"].reset_index(drop=True)
    best = rows.groupby(CELL, sort=False)["gm"].idxmax()
    return rows.assign(chosen=rows.index.isin(best))[[*CELL, "params", "ka", "zs", "gm", "chosen"]]


def chosen(found: Findings) -> dict[tuple[bool, str, str, str], str]:
    """Parameters by cell."""
    rows = swept(found)
    rows = rows[rows["chosen"]]
    return {tuple(row[key] for key in CELL): row["params"] for _, row in rows.iterrows()}


def strangers(found: Findings, studies: tuple[str, ...]) -> list[str]:
    """Trajectories of these studies whose parameters are not the chosen ones, each with what it should have."""
    wanted = chosen(found)
    told = []
    rows = found.points[found.points["study"].isin(studies) & found.points["last"]]
    for row in rows.itertuples():
        params = wanted.get((row.replay, row.init, row.deploy, row.technique))
        if params is not None and params != row.params:
            told.append(f"{row.study}: {row.trajectory} has {row.params}, the grid says {params}")
    return told
