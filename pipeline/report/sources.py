"""What a report reads of a run: results, records, timeline and study.yaml.

Invariant: reading changes nothing; what does not exist (a timeline, records) is missing in the report, never made up.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from merge_service.checkpoints import WEIGHTS_FILE
from merge_service.similarity import similarity
from pipeline.plan.steps import Plan, TrajectoryPlan
from pipeline.results.over_time import ReadOnce, results
from pipeline.run.trace import read_timeline
from pipeline.store.artifact import Record
from pipeline.store.local import Store
from pipeline.workspace.opening import open_plan, open_store

EXPERTS = 12
"""Most experts in a heat map; the first ones are compared."""
CURVE = 50
"""Points of a training curve in a figure."""


@dataclass(frozen=True)
class Studied:
    """One run: its directory, its plan and results, and the records of finished steps, by fingerprint."""

    out: Path
    plan: Plan
    answer: Mapping[str, Any]
    records: Mapping[str, Record] = field(default_factory=dict)
    store: Store | None = None

    @classmethod
    def read(cls, out: Path) -> "Studied":
        """Read OUT. Raises UserError if it is no run."""
        plan, store = open_plan(out), open_store(out)
        read = ReadOnce(store)
        steps = (*plan.bases.values(), *plan.steps.values())
        found = [read.record(step.kind, step.fingerprint) for step in steps]
        records = {record.fingerprint: record for record in found if record is not None}
        return cls(out, plan, results(plan, read), records, store)

    @property
    def timeline(self) -> list[dict[str, Any]]:
        try:
            return read_timeline(self.out)
        except OSError:
            return []

    @property
    def written(self) -> Mapping[str, Any]:
        """study.yaml as plain values; empty if there is none."""
        try:
            tree = yaml.safe_load((self.out / "study.yaml").read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return {}
        return tree if isinstance(tree, dict) else {}

    @property
    def made(self) -> list[Record]:
        """Records of steps, without those of the bases."""
        return [record for name, record in self.records.items() if name in self.plan.steps]

    def trajectory(self, name: str) -> TrajectoryPlan:
        """The trajectory of that id."""
        return next(one for one in self.plan.trajectories if one.id == name)


def compare(studied: Studied, name: str) -> pd.DataFrame | None:
    """Pairs of a trajectory's experts: part (the model, a tower, a block), one, other, cosine, conflict; None if fewer than two
    have weights in the store.
    """
    chosen, records = studied.trajectory(name), studied.records
    base = records.get(chosen.base)
    trained = [(f"t{point.t} {point.task}", records.get(point.train or "")) for point in chosen.points]
    experts = {
        name: record.path / WEIGHTS_FILE
        for name, record in trained
        if record is not None and (record.path / WEIGHTS_FILE).is_file()
    }
    if base is None or len(experts) < 2:
        return None
    found = similarity(base.path / WEIGHTS_FILE, dict(list(experts.items())[:EXPERTS]))
    towers = sorted({tower for tower, _ in found.parts})
    parts: list[tuple[str, str | None, int | None]] = [("whole model", None, None)]
    parts += [(f"{tower} tower", tower, None) for tower in towers]
    parts += [
        (f"{tower} block {block}", tower, block)
        for tower, block in sorted((t, b) for t, b in found.parts if b is not None)
    ]
    rows = []
    for part, tower, block in parts:
        cosine, conflict = found.cosine(tower, block), found.conflict(tower, block)
        rows += [
            {"part": part, "one": one, "other": other, "cosine": float(cosine[i, j]), "conflict": float(conflict[i, j])}
            for i, one in enumerate(found.names)
            for j, other in enumerate(found.names)
        ]  # fmt: skip
    return pd.DataFrame(rows)


def curves(studied: Studied, names: Iterable[str]) -> pd.DataFrame:
    """Training loss of trajectories: `trajectory`, `t`, `task`, `place` (tasks trained, a step of task t lies in (t-1, t]), `loss`.

    A curve is thinned to `CURVE` points; experts that are not in the store are left out.
    """
    rows = []
    for name in names:
        for point in studied.trajectory(name).points:
            record = studied.records.get(point.train or "")
            curve = [] if record is None else record.result.get("loss", [])
            thin = max(1, len(curve) // CURVE)
            steps = max((step for step, _ in curve), default=1)
            rows += [
                (name, point.t, point.task, point.t - 1 + step / steps, loss)
                for step, loss in curve[len(curve) % thin :: thin]
            ]
    return pd.DataFrame(rows, columns=["trajectory", "t", "task", "place", "loss"])


def notes_of(made: Sequence[Record]) -> list[str]:
    """The notes of merges, each once, with the number of merges."""
    said = Counter(
        note for record in made if record.kind == "merge" for note in record.result.get("notes", ())
    )
    return [f"{note} ({count} merge{'s' * (count != 1)})" for note, count in said.items()]
