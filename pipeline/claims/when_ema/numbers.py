"""The committed numbers: one folder of plain CSV files for each finished piece; nothing else is ever judged.

`points.csv` has a row per trajectory and t, `experts.csv` one per expert, `made.csv` a single row on what was run.

Invariant: a folder under its final name is complete; all pieces of a replicate and model have the same base.
"""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from merge_service.errors import UserError
from pipeline.claims.when_ema.design import Piece

FILES = ("points", "experts", "made")
DIGITS = 6


@dataclass(frozen=True)
class Numbers:
    """All finished pieces. Every row of `points` and `experts` has the values of `KEYS` of its piece."""

    points: pd.DataFrame
    experts: pd.DataFrame
    made: pd.DataFrame

    def of(self, *pieces: str) -> "Numbers":
        """Only these pieces."""
        return self._where("piece", pieces)

    def of_replicates(self, replicates: Iterable[int]) -> "Numbers":
        """Only these replicates."""
        return self._where("replicate", list(replicates))

    def _where(self, column: str, values: Sequence[Any]) -> "Numbers":
        frames = (self.points, self.experts, self.made)
        return Numbers(*(frame[frame[column].isin(values)].reset_index(drop=True) for frame in frames))


KEYS = (
    "piece",
    "replicate",
    "model",
    "share",
    "pretraining",
    "buffer",
    "steps_per_task",
    "tasks",
)


def has(folder: Path, piece: Piece) -> bool:
    """Whether the piece is finished."""
    return (folder / piece.key).is_dir()


def write(folder: Path, piece: Piece, frames: Mapping[str, pd.DataFrame]) -> None:
    """Write the files of a finished piece, all or none."""
    stage = folder / f".{piece.key}"
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    for name in FILES:
        frames[name].round(DIGITS).to_csv(stage / f"{name}.csv", index=False)
    stage.replace(folder / piece.key)


def read_numbers(folder: Path) -> Numbers:
    """All finished pieces under `folder`. Raises UserError if there is none, or if a replicate has two bases of one model."""
    homes = sorted(path for path in folder.glob("[0-9]*-*") if path.is_dir())
    if not homes:
        raise UserError(
            f"{folder} holds no finished piece; run python -m pipeline.claims.when_ema --replicates 0"
        )
    made = pd.concat([pd.read_csv(home / "made.csv") for home in homes], ignore_index=True)
    bases = made.groupby(["model", "replicate"])["base_sha256"].nunique()
    for model, replicate in bases[bases > 1].index:
        raise UserError(
            f"{folder}: the pieces of replicate {replicate} began at different bases of {model}; remove those that are out of date"
        )
    said = made[list(KEYS)]
    frames = {
        name: pd.concat(
            [
                pd.read_csv(home / f"{name}.csv").assign(**row)
                for home, row in zip(homes, _rows(said), strict=True)
            ],
            ignore_index=True,
        )
        for name in FILES[:2]
    }
    return Numbers(frames["points"], frames["experts"], made)


def base_of(folder: Path, piece: Piece) -> str | None:
    """The sha256 of the base of the finished pieces of the same replicate and model; None if there are none."""
    for home in sorted(folder.glob(f"{piece.replicate}-*")):
        made = pd.read_csv(home / "made.csv").iloc[0]
        if made["model"] == piece.model:
            return str(made["base_sha256"])
    return None


def _rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [dict(row) for _, row in frame.iterrows()]
