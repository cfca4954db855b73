"""The rows of a piece from its finished runs: scores of every trajectory over time, and how its experts changed the weights.

Invariant: scores are those of results.json; everything about experts comes from the store's records and their weights.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from merge_service.checkpoints import WEIGHTS_FILE, Checkpoint, recorded
from merge_service.errors import UserError
from pipeline.plan.steps import BASE, Point
from pipeline.run.carriers import CARRIERS
from pipeline.run.jobs import Jobs
from pipeline.store.artifact import Record
from pipeline.study.config import load_study
from pipeline.study.grid import Cell
from pipeline.workspace.workspace import RESULTS_FILE, STUDY_FILE, Workspace
from workers.jobs import Source, TrainJob

METRICS = ("ka", "zs", "zs_replayed", "zs_never_replayed", "gm")
CHAIN = ("init", "weight", "lr")
AT = ("init", "deploy", "weight", "lr", "t")


def points_of(out: Path) -> pd.DataFrame:
    """A row per trajectory and t: `AT`, and `METRICS` on both splits (`gm_val`, `gm_test`). Raises UserError if the run is not finished."""
    rows = pd.DataFrame(_scores(out)).astype(dict.fromkeys(("weight", "lr", *METRICS), float))
    val, test = (
        rows[rows["split"] == split]
        .drop(columns="split")
        .rename(columns={name: f"{name}_{split}" for name in METRICS})
        for split in ("val", "test")
    )
    whole = val.merge(test, on=list(AT), how="outer", validate="one_to_one")
    return whole.sort_values(list(AT), na_position="first").reset_index(drop=True)


def _scores(out: Path) -> Iterator[dict[str, Any]]:
    answer = json.loads((out / RESULTS_FILE).read_text(encoding="utf-8"))
    if not answer["complete"]:
        raise UserError(f"{out}: the run is not finished; run it again to go on")
    cells = {cell.id: cell for cell in load_study(out / STUDY_FILE).cells}
    for trajectory in answer["trajectories"]:
        what = _what(cells[trajectory["id"]])
        for step in trajectory["steps"]:
            yield {
                **what,
                "split": trajectory["split"],
                "t": step["t"],
                **{name: step.get(name) for name in METRICS},
            }


def _what(cell: Cell) -> dict[str, Any]:
    """Arm, weight and rate; the weight is None if nothing is averaged, the rate if nothing is trained."""
    strategy = cell.strategy
    return {
        "init": strategy.init,
        "deploy": strategy.deploy,
        "weight": strategy.params.get("weight") if "ema" in (strategy.init, strategy.deploy) else None,
        "lr": None if strategy.init == strategy.deploy == "base" else cell.recipe.lr,
    }


@dataclass
class Experts:
    """The experts of one finished run, chain by chain. `out` is the run; its study and store are read again."""

    out: Path
    workspace: Workspace = field(init=False)

    def __post_init__(self) -> None:
        self.workspace = Workspace.of(load_study(self.out / STUDY_FILE), self.out)
        self._jobs = Jobs(self.workspace)

    def frame(self) -> pd.DataFrame:
        """A row per expert: `CHAIN`, t, task, lengths, losses and gradient norms (defined in README.md of the study)."""
        cells = {cell.id: cell for cell in self.workspace.study.cells}
        rows: list[dict[str, Any]] = []
        seen: set[str] = set()
        for trajectory in self.workspace.plan.trajectories:
            points = [point for point in trajectory.points if point.train]
            if points and str(points[-1].train) not in seen:
                seen.add(str(points[-1].train))
                what = _what(cells[trajectory.id])
                weight = what["weight"] if what["init"] == "ema" else None
                rows += self._chain(points, {"init": what["init"], "weight": weight, "lr": what["lr"]})
        return pd.DataFrame(rows)

    def _chain(self, points: list[Point], chain: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        before: tuple[np.ndarray, np.ndarray] | None = None
        earlier: list[Source] = []
        for point in points:
            record = self._record(str(point.train))
            expert, start = flat(record.path), flat(self._start(point))
            vector = expert - start
            row = {**chain, "t": point.t, "task": point.task, **_recorded(record)}
            drift = float(np.linalg.norm(vector))
            row |= {"drift": drift, "relative_drift": drift / float(np.linalg.norm(start))}
            row |= {"distance": None, "cosine": None}
            if before is not None:
                row |= {
                    "distance": float(np.linalg.norm(expert - before[0])),
                    "cosine": _cosine(vector, before[1]),
                }
            step = self.workspace.plan.steps[str(point.train)]
            job = CARRIERS[step.kind].job(self._jobs, step)
            assert isinstance(job, TrainJob)
            if chain["init"] == "latest":
                row |= self._losses(job, record, earlier)
            earlier += job.update
            before = expert, vector
            yield row

    def _losses(self, job: TrainJob, record: Record, earlier: list[Source]) -> dict[str, float]:
        from workers.training.landscape import along

        root = str(Path(self.workspace.study.data_root).absolute())
        pool = [Source(root, name, "train") for name in self.workspace.study.roles.pretraining]
        found = along(job, record.path, [*pool, *earlier])
        return {
            f"{name}_{place}": loss
            for name, losses in found.items()
            for place, loss in zip(("start", "middle", "end"), losses, strict=True)
        }

    def _start(self, point: Point) -> Path:
        if point.init == BASE:
            (step,) = self.workspace.plan.bases.values()
            return self._record(step.fingerprint).path
        return self._record(str(point.init)).path

    def _record(self, fingerprint: str) -> Record:
        record: Record | None = self.workspace.known(fingerprint)
        if record is None:
            raise UserError(f"{self.out}: {fingerprint[:16]} is not in the store; run the piece again")
        return record


def flat(directory: Path) -> np.ndarray:
    """All float tensors of a weights directory as one vector, tied ones once, in float64."""
    with Checkpoint.open(directory / WEIGHTS_FILE) as checkpoint:
        ties = recorded(checkpoint)
        names = [name for name, info in checkpoint.tensors.items() if info.kind.is_float and name not in ties]
        return np.concatenate(
            [checkpoint.read(name).astype(np.float64).reshape(-1) for name in sorted(names)]
        )


def _recorded(record: Record) -> dict[str, Any]:
    result = record.result
    norms = [*result.get("grad_norm", ()), None, None, None][:3]
    return {
        "task_vector_norm": result["task_vector_norm"],
        "loss_first": result["loss"][0][1],
        "loss_last": result["loss"][-1][1],
        **dict(zip(("grad_first", "grad_highest", "grad_last"), norms, strict=True)),
    }


def _cosine(one: np.ndarray, other: np.ndarray) -> float | None:
    lengths = np.linalg.norm(one) * np.linalg.norm(other)
    return float(one @ other / lengths) if lengths else None
