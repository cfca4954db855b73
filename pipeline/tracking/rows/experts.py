"""The rows of unique experts: one run and one model each, for any number of trajectories, all under one parent run.

Invariant: names and parameters of the run come from the plan, so they are the same whether training failed first or not;
measurements come from the records.
"""

from collections.abc import Mapping, Sequence

from pipeline.plan.steps import BASE, Step
from pipeline.results import over_time as results
from pipeline.store.artifact import Record
from pipeline.tracking.outbox import Row
from pipeline.tracking.rows.index import DIGEST_CHARACTERS, EXPERTS, STUDY, Index, expert_key
from pipeline.tracking.rows.lineage import Checkpoint, Described
from pipeline.tracking.rows.names import budget_text, flat, on_split
from pipeline.tracking.rows.rows import Metrics, Rows, Run

CONTEXTS = {"update": "training", "buffer": "replay", "pretraining": "pretraining"}
"""Parts of a training mixture, by MLflow's context of a dataset."""


class ExpertRows:
    """Builds the rows of experts. `records` is shared with the projection and grows."""

    def __init__(self, index: Index, rows: Rows, records: Mapping[str, Record], described: Described) -> None:
        self._index, self._rows, self._records, self._described = index, rows, records, described
        self._common = described.common

    def run(self, step: Step, start_ms: int) -> Row:
        trajectory, point = self._index.experts[step.fingerprint]
        searchable = {
            "t": str(point.t),
            "task": point.task,
            "strategy.init": BASE if point.init == BASE else trajectory.init,
            "budget": budget_text(trajectory.budget),
            "seed": str(trajectory.seed),
        }
        data = {
            key: " ".join(s["dataset"] for s in step.spec.get(key, ())) or None
            for key in ("update", "buffer")
        }
        datasets = [
            {"name": source["dataset"], "digest": source["digest"][:DIGEST_CHARACTERS], "context": context}
            for key, context in CONTEXTS.items()
            for source in step.spec.get(key, ())
        ]
        named = ("steps", "recipe", "engine", "weights")
        settings: dict[str, object] = {key: step.spec[key] for key in named if key in step.spec}
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
        key = expert_key(step.fingerprint)
        return self._rows.run(Run(key, EXPERTS, name, tags, params, datasets), start_ms)

    def _model(self, step: Step, record: Record) -> Row:
        """The weights as a model, whose input is the model that the expert started from."""
        trajectory, point = self._index.experts[step.fingerprint]
        searchable = {"t": str(point.t), "task": point.task, "seed": str(trajectory.seed)}
        used = self._index.used_by(step.fingerprint)
        note = (
            f"The expert of **{point.task}** (t={point.t}), used by {len(used)} of the study's trajectories."
        )
        start = self._index.model_of(step.inputs.get("init", step.base))
        checkpoint = Checkpoint(record, point.t, point.task)
        body = {
            "name": self._index.expert_model_names[step.fingerprint],
            "type": "expert",
            "step": point.t,
            "params": searchable,
            "tags": {**searchable, **self._described.tags(checkpoint, note)},
            "inputs": [] if start is None else [start],
            **self._described.files(checkpoint),
        }
        key = expert_key(step.fingerprint)
        return self._rows.model(key, key, record.created_ms, body)

    def group(self, start_ms: int) -> Row:
        """The parent run of experts, which keeps them apart from the trajectories."""
        count = len(self._index.experts)
        note = "Every expert of the study, trained once however many trajectories use it."
        tags = {**self._common, "kind": EXPERTS, "mlflow.note.content": note}
        return self._rows.run(Run(EXPERTS, STUDY, f"experts ({count})", tags), start_ms)

    def trained(self, step: Step, record: Record) -> list[Row]:
        """The run, its training curve (step = optimizer step), its totals (step = t), and its end."""
        key, result, t = expert_key(step.fingerprint), record.result, step.t
        metrics = Metrics(record.created_ms)
        for index, value in result.get("loss") or []:
            metrics.add("loss", value, int(index))
        metrics.add("task_vector_norm", result.get("norms", {}).get("norm"), t)
        for name in ("steps", "samples", "samples_per_second", "task_vector_norm"):
            metrics.add(name, result.get(name), t)
        metrics.add("gflops", result.get("gflops", step.gflops), t)
        metrics.add(
            "train_seconds" if step.kind == "train" else "take_seconds",
            result.get("seconds", record.seconds),
            t,
        )
        _add_usage(metrics, result.get("system") or {})
        return [
            self.run(step, record.created_ms - int(record.seconds * 1000)),
            self._model(step, record),
            self._rows.log(key, "training", metrics, tags=self._described.lineage.tags(record)),
            self._rows.status(key, "FINISHED", record.created_ms),
            *self._base_score(step.fingerprint),
        ]

    def measured(self, step: Step, record: Record) -> list[Row]:
        """What was measured of each expert: rows of data, bytes and seconds, by kind (step = t)."""
        kind, result, rows = step.spec["statistic"], record.result, list[Row]()
        experts = [model for model in step.inputs.values() if model in self._index.experts]
        for expert in experts if len(experts) == 1 else ():
            metrics = Metrics(record.created_ms)
            metrics.add(f"measured/{kind}/examples", sum(result["examples"]), step.t)
            metrics.add(f"measured/{kind}/bytes", result["bytes"], step.t)
            metrics.add(f"measured/{kind}/seconds", result["seconds"], step.t)
            metrics.add(f"measured/{kind}/gflops", step.gflops, step.t)
            rows.append(self._rows.log(expert_key(expert), f"measured/{step.fingerprint[:16]}", metrics))
        return rows

    def evaluated(self, step: Step, record: Record) -> list[Row]:
        """Scores on the experts' own tasks from an evaluation: of the experts, or of the base for comparison."""
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
        """The score on the datasets of the expert's own task: of one, or the mean of several."""
        trajectory, point = self._index.experts[expert]
        own = self._index.plan.tasks(trajectory)[point.task]
        name = on_split(name, self._index.splits[evaluation.fingerprint])
        metrics = Metrics(evaluation.created_ms)
        metrics.add(name, results.mean(evaluation.result["scores"], own), point.t)
        key = expert_key(expert)
        return [self._rows.log(key, name, metrics, key)] if metrics.values else []


def _add_usage(metrics: Metrics, system: Mapping[str, Sequence[float]]) -> None:
    """The use of the machine during training, under the names of MLflow's system metrics."""
    for name in system.keys() - {"time_ms"}:
        for step, (stamp, value) in enumerate(zip(system["time_ms"], system[name], strict=True)):
            metrics.add(f"system/{name}", value, step, stamp=int(stamp))
