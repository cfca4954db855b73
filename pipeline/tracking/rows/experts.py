"""The rows of unique experts: one run each, however many trajectories use it, all under one run of their own.

Invariant: what the run is called and set up with comes from the plan, so that it is the same whether training failed
first or not; what was measured comes from the records.
"""

from collections.abc import Mapping

from pipeline.plan.steps import BASE, Step
from pipeline.results import over_time as results
from pipeline.store.artifact import Record
from pipeline.tracking.outbox import Row
from pipeline.tracking.rows.index import EXPERTS, STUDY, Index, expert_key
from pipeline.tracking.rows.names import budget_text, flat, on_split
from pipeline.tracking.rows.rows import Metrics, Rows, Run


class ExpertRows:
    """Makes them. `records` is shared with the projection and grows; `common` are tags every run has."""

    def __init__(
        self, index: Index, rows: Rows, records: Mapping[str, Record], common: Mapping[str, str]
    ) -> None:
        self._index, self._rows, self._records, self._common = index, rows, records, common

    def run(self, step: Step, start_ms: int) -> Row:
        trajectory, point = self._index.experts[step.fingerprint]
        searchable = {
            "t": str(point.t),
            "task": point.task,
            "strategy.init": BASE if point.init == BASE else trajectory.init,
            "budget": budget_text(trajectory.budget),
            "seed": str(trajectory.seed),
        }
        data = {key: " ".join(s["dataset"] for s in step.spec[key]) or None for key in ("update", "buffer")}
        settings = {key: step.spec[key] for key in ("steps", "recipe", "engine")}
        used = self._index.used_by(step.fingerprint)
        listed = ", ".join(used if len(used) <= 10 else [*used[:10], f"and {len(used) - 10} more"])
        tags = {
            **self._common,
            "kind": "expert",
            **searchable,
            "fingerprint": step.fingerprint,
            "mlflow.note.content": f"The expert of **{point.task}** (t={point.t}). Trained once, used by: {listed}.",
        }
        params = {**flat(settings), **flat({"data": data}), **searchable}
        name = self._index.expert_names[step.fingerprint]
        return self._rows.run(Run(expert_key(step.fingerprint), EXPERTS, name, tags, params), start_ms)

    def group(self, start_ms: int) -> Row:
        """The run that experts are filed under, so that they do not bury the trajectories."""
        count = len(self._index.experts)
        note = "Every expert of the study, trained once however many trajectories use it."
        tags = {**self._common, "kind": EXPERTS, "mlflow.note.content": note}
        return self._rows.run(Run(EXPERTS, STUDY, f"experts ({count})", tags), start_ms)

    def trained(self, step: Step, record: Record, lineage: Mapping[str, str]) -> list[Row]:
        """The run, its training curve (step = optimizer step) and its totals (step = t), and its end."""
        key, result, t = expert_key(step.fingerprint), record.result, step.t
        metrics = Metrics(record.created_ms)
        for index, value in result.get("loss") or []:
            metrics.add("loss", value, int(index))
        for name in ("steps", "samples", "samples_per_second", "task_vector_norm"):
            metrics.add(name, result.get(name), t)
        metrics.add("gflops", result.get("gflops", step.gflops), t)
        metrics.add("train_seconds", result.get("seconds", record.seconds), t)
        return [
            self.run(step, record.created_ms - int(record.seconds * 1000)),
            self._rows.log(key, "training", metrics, tags=lineage),
            self._rows.status(key, "FINISHED", record.created_ms),
            *self._base_score(step.fingerprint),
        ]

    def evaluated(self, step: Step, record: Record) -> list[Row]:
        """Scores on the experts' own tasks that an evaluation brings: of the experts, or of the base to compare with."""
        rows = []
        if step.fingerprint in self._index.base_evaluations.values():
            for expert in self._index.experts:
                rows += self._base_score(expert)
        for expert in sorted(self._index.scored.get(step.fingerprint, ())):
            rows += self._score(expert, "own_task_score", record)
        return rows

    def _base_score(self, expert: str) -> list[Row]:
        base = self._index.experts[expert][0].base
        if expert not in self._records:
            return []
        scores = [fp for (of, _), fp in self._index.base_evaluations.items() if of == base]
        known = [self._records[fp] for fp in scores if fp in self._records]
        return [row for one in known for row in self._score(expert, "base_own_task_score", one)]

    def _score(self, expert: str, name: str, evaluation: Record) -> list[Row]:
        """On the datasets of the expert's own task: one, or the mean of several."""
        trajectory, point = self._index.experts[expert]
        own = self._index.plan.tasks(trajectory)[point.task]
        name = on_split(name, self._index.splits[evaluation.fingerprint])
        metrics = Metrics(evaluation.created_ms)
        metrics.add(name, results.mean(evaluation.result["scores"], own), point.t)
        return [self._rows.log(expert_key(expert), name, metrics)] if metrics.values else []
