"""The results of the studies of a reproduction as one frame: a row per trajectory, kept as a CSV file per study.

Verdicts, figures and page are made from these files alone, so studies can be run separately and their stores deleted.

Invariant: every number is one of a study's results.json, rounded to six digits. The replicate, replay and parameters of a row are
read from the study file beside it, never from names.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from merge_service.errors import UserError
from pipeline.results.over_time import read_finished
from pipeline.study.config import load_study
from pipeline.study.grid import Cell

METRICS = ("ka", "zs", "zs_replayed", "zs_never_replayed", "gm")
STREAM = tuple(f"stream_{metric}" for metric in METRICS)
"""The same metrics, as means over the points t >= 1."""
CELL = ("study", "init", "deploy", "technique", "params", "replay", "model", "multiplier", "lr", "tasks")
COLUMNS = (*CELL, "replicate", "trajectory", "split", *METRICS, *STREAM, "over_time", "plan", "commit")
TEXT = ("study", "init", "deploy", "technique", "params", "model", "replicate", "trajectory", "split", "over_time", "plan", "commit")  # fmt: skip
DIGITS = 6


@dataclass(frozen=True)
class Findings:
    """Rows (`COLUMNS`) of several studies. Scores are fractions in [0, 1], at the last t or (`STREAM`) over all t >= 1.

    `over_time` is GM at t = 0, 1, ..., separated by blanks; `replicate` is the name of a repetition; what was not scored is NaN.
    """

    rows: pd.DataFrame

    def has(self, study: str) -> bool:
        return bool((self.rows["study"] == study).any())

    def final(self, study: str, **where: Any) -> pd.DataFrame:
        """The rows of a study that match `where`. Raises UserError if there are none."""
        rows = self.rows[self.rows["study"] == study]
        for column, value in where.items():
            rows = rows[rows[column].isin(value) if isinstance(value, list) else rows[column] == value]
        if rows.empty:
            raise UserError(f"study {study} has no finished trajectory with {where}; run it to its end")
        return rows

    def metric(self, study: str, name: str = "gm", **where: Any) -> pd.Series:
        """One number per replicate. Raises UserError if `where` selects none, or several of a replicate."""
        rows = self.final(study, **where)
        if rows["replicate"].duplicated().any():
            several = sorted(set(rows["trajectory"]))[:4]
            raise UserError(f"study {study}: {where} is not one trajectory but {', '.join(several)}")
        return rows.set_index("replicate")[name].sort_index()

    def strange_bases(self) -> list[str]:
        """Studies whose zero-shot score differs from that of the first study with the same model and split: another base or other
        sets.
        """
        zero = self.rows[(self.rows["init"] == "base") & (self.rows["deploy"] == "base")]
        first = zero.groupby(["model", "split"], sort=False)["gm"].transform("first")
        return sorted(set(zero[(zero["gm"] - first).abs() > 10**-DIGITS]["study"]))

    def of_one_replicate(self) -> "Findings":
        """The first replicate of each study: the rows of a quick reproduction."""
        first = self.rows.groupby("study")["replicate"].transform("first")
        return Findings(self.rows[self.rows["replicate"] == first])


def read_run(out: Path, name: str, commit: str) -> pd.DataFrame:
    """The rows of a study that ran in `out`. Raises UserError if it is missing or not finished."""
    return pd.DataFrame(list(_rows(out, name, commit)), columns=list(COLUMNS)).round(DIGITS)


def write_rows(folder: Path, rows: pd.DataFrame) -> Path:
    """One study's rows as `folder`/STUDY.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{rows['study'].iloc[0]}.csv"
    rows.to_csv(path, index=False, lineterminator="\n")
    return path


def read_rows(folder: Path, studies: Sequence[str]) -> Findings:
    """The rows that `write_rows` wrote for those `studies` that exist. Raises UserError if none does."""
    frames = [_read(folder / f"{name}.csv") for name in studies if (folder / f"{name}.csv").is_file()]
    if not frames:
        raise UserError(f"{folder} holds no rows of any study; run python -m pipeline.claims first")
    return Findings(pd.concat(frames, ignore_index=True))


def _read(path: Path) -> pd.DataFrame:
    rows = pd.read_csv(path, dtype=dict.fromkeys(TEXT, str), keep_default_na=False, na_values={c: [""] for c in (*METRICS, *STREAM)})  # fmt: skip
    if tuple(rows.columns) != COLUMNS:
        raise UserError(f"{path} has other columns than {', '.join(COLUMNS)}; run its study again")
    return rows


def _rows(out: Path, name: str, commit: str) -> Iterator[dict[str, Any]]:
    answer = read_finished(out)
    cells = {cell.id: cell for cell in load_study(out / "study.yaml").cells}
    for trajectory in answer["trajectories"]:
        steps = trajectory["steps"]
        yield {
            "study": name, **_described(trajectory, cells[trajectory["id"]]),
            **{metric: _number(steps[-1].get(metric)) for metric in METRICS},
            **{f"stream_{metric}": _mean([step.get(metric) for step in steps[1:]]) for metric in METRICS},
            "over_time": " ".join(f"{step['gm']:.4f}" for step in steps), "plan": answer["plan"][:12], "commit": commit,
        }  # fmt: skip


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else math.nan


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
        "lr": cell.recipe.lr,
        "tasks": len(trajectory["stream"]),
        "replicate": _replicate(cell),
        "split": cell.split,
    }


def _replicate(cell: Cell) -> str:
    """The order of tasks, by its seed or its first tasks; the seed of the training for joint training, which has no order."""
    stream = cell.stream
    if cell.strategy.joint:
        return f"order {cell.seed}"
    order = f"order {stream.seed}" if stream.order == "random" else " ".join((stream.tasks or ("",))[:2])
    return order if cell.seed == 0 else f"{order}, seed {cell.seed}"


def readable(params: str) -> str:
    """The parameters of a row as text: `scale: 0.3`; empty for the defaults."""
    return params.strip("{}").replace('"', "")
