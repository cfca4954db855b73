"""What the studies of a reproduction found, as one frame: a row per trajectory and point.

Invariant: every number is one of a study's results.json, and what a row is (replicate, replay, parameters) is read from the
study that lies beside it, never from names.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from merge_service.errors import UserError
from pipeline.study.config import load_study
from pipeline.study.grid import Cell

METRICS = ("ka", "zs", "gm")
CELL = ("study", "init", "deploy", "technique", "params", "replay", "model", "multiplier", "tasks")
COLUMNS = (*CELL, "replicate", "trajectory", "t", "last", *METRICS, "plan")


@dataclass(frozen=True)
class Findings:
    """All points of several studies (`COLUMNS`). Scores are fractions in [0, 1]; `replicate` is what a repetition is called."""

    points: pd.DataFrame

    def final(self, study: str, **where: Any) -> pd.DataFrame:
        """The last points of a study's trajectories that are as `where` says. Raises UserError if there are none."""
        rows = self.points[(self.points["study"] == study) & self.points["last"]]
        for column, value in where.items():
            wanted = value if isinstance(value, list | tuple | set) else [value]
            rows = rows[rows[column].isin(wanted)]
        if rows.empty:
            raise UserError(f"study {study} has no finished trajectory with {where}; run it to its end")
        return rows

    def metric(self, study: str, name: str = "gm", **where: Any) -> pd.Series:
        """One number per replicate. Raises UserError if `where` leaves none, or several to a replicate."""
        rows = self.final(study, **where)
        if rows["replicate"].duplicated().any():
            several = sorted(set(rows["trajectory"]))[:4]
            raise UserError(f"study {study}: {where} is not one trajectory but {', '.join(several)}")
        return rows.set_index("replicate")[name].sort_index()

    def of_one_replicate(self) -> "Findings":
        """Of each study its first replicate alone: what a quick reproduction has."""
        first = self.points.groupby("study")["replicate"].transform("first")
        return Findings(self.points[self.points["replicate"] == first])


def read_findings(root: Path, studies: tuple[str, ...]) -> Findings:
    """The finished studies `root`/NAME. Raises UserError if one is missing or not finished."""
    return Findings(
        pd.DataFrame([row for name in studies for row in _rows(root / name, name)], columns=list(COLUMNS))
    )


def _rows(out: Path, name: str) -> Iterator[dict[str, Any]]:
    try:
        answer = json.loads((out / "results.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{out} holds no results.json; run the study {name} first") from None
    if not answer["complete"]:
        raise UserError(f"{out}: study {name} is not finished; run it again to go on")
    cells = {cell.id: cell for cell in load_study(out / "study.yaml").cells}
    for trajectory in answer["trajectories"]:
        what = _described(trajectory, cells[trajectory["id"]])
        for step in trajectory["steps"]:
            yield {
                "study": name, "plan": answer["plan"], **what, "t": step["t"],
                "last": step is trajectory["steps"][-1], **{metric: step[metric] for metric in METRICS},
            }  # fmt: skip


def _described(trajectory: Mapping[str, Any], cell: Cell) -> dict[str, Any]:
    strategy = cell.strategy
    return {
        "trajectory": trajectory["id"],
        "init": "joint" if strategy.joint else strategy.init,
        "deploy": "joint" if strategy.joint else strategy.deploy,
        "technique": trajectory["technique"] or "-",
        "params": json.dumps({k: v for k, v in sorted(strategy.params.items()) if k != "seed"}),
        "replay": cell.recipe.mixture.buffer > 0,
        "model": trajectory["model"],
        "multiplier": cell.budget.multiplier,
        "tasks": len(trajectory["stream"]),
        "replicate": _replicate(cell),
    }


def _replicate(cell: Cell) -> str:
    """The order of tasks by its seed or its first tasks, then the seed of training where it is not 0."""
    stream = cell.stream
    order = f"order {stream.seed}" if stream.order == "random" else " ".join((stream.tasks or ("",))[:2])
    return order if cell.seed == 0 else f"{order}, seed {cell.seed}"


def readable(params: str) -> str:
    """The parameters of a row for people: `scale: 0.3`; nothing where they are the defaults."""
    return params.strip("{}").replace('"', "")
