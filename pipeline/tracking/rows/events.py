"""A study as rows for the tracker: a pure projection of (plan, records), with no MLflow and no clock in it.

Invariant: the same plan and the same records give the same rows under the same keys, in whatever order the steps
finished and however often they are told; every timestamp of a measurement comes from its record.

What becomes what:
- the study is the parent run; under it one run per trajectory, and one run that holds one run per unique expert;
- every checkpoint a trajectory serves at t >= 1 is a model of its own, found by its name (`best_in_time-t3-photos_b`),
  even when its bytes are another's (an expert that is served as it is). The base is logged once and stands for every t
  of a trajectory that serves it (`zero_shot`);
- what is known of a trajectory at t is a metric of its run with step = t, attached to the model as well.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from merge_service.checkpoints import CONFIG_FILE, WEIGHTS_FILE
from pipeline.plan.steps import BASE, Plan, Point, Step, TrajectoryPlan
from pipeline.results import over_time as results
from pipeline.results.over_time import OverTime, seen, sentence_of
from pipeline.store.artifact import Record
from pipeline.store.versions import counted, mixed_text
from pipeline.tracking.outbox import Row
from pipeline.tracking.rows.experts import ExpertRows
from pipeline.tracking.rows.index import (
    EXPERTS,
    STUDY,
    Index,
    base_key,
    expert_key,
    model_key,
    scored_model,
    steps_of,
    trajectory_key,
)
from pipeline.tracking.rows.lineage import Lineage
from pipeline.tracking.rows.names import (
    flat,
    metric_name,
    model_name,
    on_split,
    opening_note,
    plain,
    served_note,
    strategy_tags,
    trajectory_note,
)
from pipeline.tracking.rows.rows import Metrics, Rows, Run


@dataclass(frozen=True)
class StudyFacts:
    """What the projection must know beside the plan; `settings` is the resolved study file as plain values, `store`
    where artifacts are, for people: relative to OUT, or a path or URL."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    code_version: str = ""
    log_weights: bool = True
    store: str = "store"
    registry: Mapping[str, str] | None = None
    """{"name", "by", "alias"} of the registered model that the best trajectory becomes a version of; None: of none."""
    title: str | None = None
    """The name of the parent run; None: the study's."""
    earlier: tuple[str, ...] = ()
    """The names of the parent runs of other plans that OUT held before."""


@dataclass
class _Reached:
    """How far a trajectory has been told: points scored without a gap, the time of the newest of them, what is waited for."""

    over_time: OverTime
    waiting: set[str]
    places: int = 0
    stamp: int = 0
    end: int = 0


class Projection:
    """Rows of one plan. It remembers the records it was told, and nothing else. `bases` are the records of the bases, by fingerprint."""

    def __init__(self, plan: Plan, facts: StudyFacts, bases: Mapping[str, Record]) -> None:
        self.index = Index(plan)
        self.rows = Rows(self.index.fingerprint)
        self._plan, self._facts, self._bases = plan, facts, bases
        self._records: dict[str, Record] = {}
        self._reached = {
            trajectory.id: _Reached(
                OverTime(trajectory.points, plan.tasks(trajectory)),
                set().union(*(steps_of(point) for point in trajectory.points)),
            )
            for trajectory in plan.trajectories
        }
        self._lineage = Lineage(plan.steps, self._records, bases, facts.store)
        self._common = {
            "study": plan.study,
            "code_version": facts.code_version,
            "mlflow.source.name": "temporal-merge run",
            "mlflow.source.type": "LOCAL",
        }
        self._experts = ExpertRows(self.index, self.rows, self._records, self._common)

    def started(self, now_ms: int) -> list[Row]:
        """The parent run, the runs of all trajectories, the base model. Only the `now_ms` of the first call ever counts.

        The runs start a millisecond apart, since the UI lists the newest first: trajectories in the study's order, then
        the experts.
        """
        note = (
            f"{len(self._plan.trajectories)} trajectories over {len(self.index.experts)} experts. Unfold this run to see"
            " them; the step of every metric of a trajectory is t. **Models** lists every served checkpoint by"
            " trajectory, t and task."
        )
        if self._facts.earlier:
            note += f"\n\nThe study was changed in its OUT: {', '.join(self._facts.earlier)} came before; those runs and models stay."
        tags = {**self._common, "kind": STUDY, "mlflow.note.content": note}
        trajectories, title = self._plan.trajectories, self._facts.title or self._plan.study
        return [
            self.rows.run(Run(STUDY, None, title, tags, self.settings(), self._datasets()), now_ms),
            *(
                self._trajectory_row(trajectory, now_ms - i)
                for i, trajectory in enumerate(trajectories, start=1)
            ),
            self._experts.group(now_ms - len(trajectories) - 1),
            *map(self._base_model_row, self._bases.values()),
        ]

    def settings(self) -> dict[str, str]:
        """The study's settings as MLflow parameters; the grid's are those of the trajectories."""
        settings = flat(self._facts.settings)
        return {key: value for key, value in settings.items() if not key.startswith(("grid.", "storage."))}

    def finished(self, table: str | None = None, best: str | None = None) -> list[Row]:
        """The end of the study, all steps done; `table` is its results as CSV, `best` the trajectory to register."""
        end = max(record.created_ms for record in (*self._bases.values(), *self._records.values()))
        rows = [] if table is None else [self.rows.artifact(STUDY, "results.csv", end, text=table)]
        several = mixed_text(counted((*self._bases.values(), *self._records.values())))
        if several:
            rows.append(self.rows.log(STUDY, "versions", Metrics(end), tags={"library_versions": several}))
        rows += [self.rows.status(key, "FINISHED", end) for key in (EXPERTS, STUDY)]
        return rows if best is None or self._facts.registry is None else rows + self._best_rows(best, end)

    def failed(self, step: Step, error: str, at_ms: int) -> list[Row]:
        """A step gave up: its expert's run, every trajectory that uses it, and the study are marked as failed."""
        rows, keys = [], [STUDY]
        if step.fingerprint in self.index.experts:
            rows.append(self._experts.run(step, at_ms))
            keys += [EXPERTS, expert_key(step.fingerprint)]
        keys += [trajectory_key(trajectory) for trajectory, _ in self.index.users.get(step.fingerprint, [])]
        return [*rows, *(self.rows.status(key, "FAILED", at_ms, error[:1000]) for key in dict.fromkeys(keys))]

    def step(self, step: Step, record: Record) -> list[Row]:
        """All rows that a finished step makes possible. Steps come in any order that the plan allows."""
        self._records[step.fingerprint] = record
        rows: list[Row] = []
        if step.fingerprint in self.index.experts:
            rows += self._experts.trained(step, record, self._lineage.tags(record))
        if step.kind == "evaluate":
            rows += self._experts.evaluated(step, record)
        for (base, split), evaluation in self.index.base_evaluations.items():
            if step.fingerprint == evaluation:
                model, scores = base_key(base), self._scores(record, 0, shared=True)
                rows.append(self.rows.log(STUDY, on_split(model, split), scores, model))
        users = self.index.users.get(step.fingerprint, [])
        for trajectory, point in users:
            if step.fingerprint == point.deployed:
                rows.append(self._model_row(trajectory, point, record))
            if step.fingerprint == point.merge:
                rows.append(self._merge_row(trajectory, point, record))
            if step.fingerprint == point.evaluate:
                rows.append(self._score_row(trajectory, point, record))
        for trajectory in {trajectory.id: trajectory for trajectory, _ in users}.values():
            rows += self._over_time_rows(trajectory) if step.kind == "evaluate" else []
            rows += self._end_row(trajectory, step, record)
        return rows

    # --- a trajectory -------------------------------------------------------------------------------------------------

    def _trajectory_row(self, trajectory: TrajectoryPlan, now_ms: int) -> Row:
        searchable = strategy_tags(trajectory)
        params = {**searchable, **flat(trajectory.params, "technique."), **flat(trajectory.axes)}
        if trajectory.ema_seed is not None:
            params["strategy.ema_seed"] = trajectory.ema_seed
        tags = {
            **self._common,
            "kind": "trajectory",
            **searchable,
            "stream": " ".join(trajectory.stream)[:500],
            "mlflow.note.content": trajectory_note(trajectory),
        }
        name = self.index.names[trajectory.id]
        return self.rows.run(Run(trajectory_key(trajectory), STUDY, name, tags, params), now_ms)

    def _score_row(self, trajectory: TrajectoryPlan, point: Point, record: Record) -> Row:
        metrics, model = self._scores(record, point.t), scored_model(trajectory, point)
        return self.rows.log(trajectory_key(trajectory), f"t{point.t}/scores", metrics, model)

    def _merge_row(self, trajectory: TrajectoryPlan, point: Point, record: Record) -> Row:
        result, metrics = record.result, Metrics(record.created_ms)
        metrics.add("merge_seconds", result.get("merge_seconds", record.seconds), point.t)
        metrics.add("merged_norm", result.get("merged_norm"), point.t)
        metrics.add("cosine_with_expert", result.get("cosine"), point.t)
        model = model_key(trajectory, point) if point.merge == point.deployed else None
        return self.rows.log(trajectory_key(trajectory), f"t{point.t}/merge", metrics, model)

    def _over_time_rows(self, trajectory: TrajectoryPlan) -> list[Row]:
        """Forgetting and backward transfer at every further t up to which all evaluations are there by now."""
        reached, rows = self._reached[trajectory.id], []
        while reached.places < len(trajectory.points):
            point = trajectory.points[reached.places]
            record = self._records.get(point.evaluate)
            if record is None:
                break
            reached.places += 1
            reached.stamp = max(reached.stamp, record.created_ms)
            forgotten, backward = reached.over_time.add(point.t, record.result["scores"])
            metrics = Metrics(reached.stamp)
            metrics.add("forgetting", forgotten, point.t)
            metrics.add("backward_transfer", backward, point.t)
            if metrics.values:
                what, model = f"t{point.t}/over_time", scored_model(trajectory, point)
                rows.append(self.rows.log(trajectory_key(trajectory), what, metrics, model))
        return rows

    def _end_row(self, trajectory: TrajectoryPlan, step: Step, record: Record) -> list[Row]:
        reached = self._reached[trajectory.id]
        reached.waiting.discard(step.fingerprint)
        reached.end = max(reached.end, record.created_ms)
        return (
            [] if reached.waiting else [self.rows.status(trajectory_key(trajectory), "FINISHED", reached.end)]
        )

    def _scores(self, record: Record, t: int, shared: bool = False) -> Metrics:
        """The metrics of an evaluation; `shared` with other splits, their names say on which they are."""
        scores, metrics = record.result["scores"], Metrics(record.created_ms)
        split = self.index.splits[record.fingerprint]
        ka, zs = results.mean(scores, self._plan.adaptation), results.mean(scores, self._plan.held_out)
        groups = results.zs_of_groups(scores, self._plan.zero_shot_groups)
        for name, value in {"ka": ka, "zs": zs, "gm": results.gm(ka, zs), **groups}.items():
            metrics.add(on_split(name, split) if shared else name, value, t)
        for dataset, score in sorted(scores.items()):
            name = metric_name("score", dataset)
            digest = self.index.digests.get((dataset, split))
            metrics.add(on_split(name, split) if shared else name, score, t, dataset, digest)
        return metrics

    # --- models -------------------------------------------------------------------------------------------------------

    def _model_row(self, trajectory: TrajectoryPlan, point: Point, record: Record) -> Row:
        key, name = model_key(trajectory, point), self.index.names[trajectory.id]
        assert key is not None
        searchable = {"t": str(point.t), "task": point.task, **strategy_tags(trajectory)}
        strategy = {**strategy_tags(trajectory), "params": trajectory.params, "trajectory": name}
        body = {
            "name": model_name(trajectory, self.index.names, point),
            "type": "expert" if record.kind == "train" else "merged",
            "step": point.t,
            "params": {**searchable, **flat(trajectory.params, "technique.")},
            "tags": {
                **searchable,
                **self._model_tags(record, served_note(name, point)),
            },
            "manifest": {**self._manifest(record, point.t, point.task), "strategy": strategy},
        }
        stamp = record.created_ms
        return self.rows.model(key, trajectory_key(trajectory), stamp, {**body, **self._files(record)})

    def _best_rows(self, best: str, stamp: int) -> list[Row]:
        """What the best trajectory serves at its last t, as a version of the study's registered model, and its alias."""
        registry = self._facts.registry
        assert registry is not None
        trajectory = next(one for one in self._plan.trajectories if one.id == best)
        point = trajectory.points[-1]
        record = self._bases[trajectory.base] if point.deployed == BASE else self._records[point.deployed]
        name, by = self.index.names[best], registry["by"].upper()
        tags = {
            "study": self._plan.study,
            "trajectory": name,
            "chosen_by": registry["by"],
            "t": str(point.t),
            "task": point.task,
            **strategy_tags(trajectory),
            **self._lineage.tags(record),
        }
        why = f"Of the study's trajectories it has the highest {by} at its last t (mean over seeds)."
        note = "\n\n".join([served_note(name, point), why, self._lineage.note(record)])
        body = {"name": registry["name"], "tags": tags, "note": note}
        model, run = model_key(trajectory, point), trajectory_key(trajectory)
        if point.deployed == BASE:
            model, run = base_key(trajectory.base), STUDY
        assert model is not None, "only the base's t=0 has none"
        return [
            self.rows.register(model, run, stamp, body),
            self.rows.alias(model, stamp, registry["name"], registry["alias"]),
        ]

    def _base_model_row(self, base: Record) -> Row:
        model = self._plan.bases[base.fingerprint].model
        several = f"-{model}" if len(self._bases) > 1 else ""
        searchable, said = {"t": "0", "task": BASE}, seen(model, base) or {}
        how = flat({key: value for key, value in said.items() if key != "notes"}, "base.")
        body = {
            "name": plain(f"{BASE}-{self._plan.study}{several}"),
            "type": BASE,
            "step": 0,
            "params": searchable | {key: value[:250] for key, value in how.items()},
            "tags": {
                **searchable,
                **self._model_tags(
                    base, " ".join(["The base model the study starts from.", sentence_of(said)]).strip()
                ),
            },
            "manifest": self._manifest(base, 0, BASE),
        }
        return self.rows.model(
            base_key(base.fingerprint), STUDY, base.created_ms, {**body, **self._files(base)}
        )

    def _model_tags(self, record: Record, note: str) -> dict[str, str]:
        """Tags are for searching: a model's page shows none of them, so its description says the same in words."""
        text = "\n\n".join([note, self._lineage.note(record), opening_note(self._facts.log_weights)])
        return {**self._common, "kind": "model", **self._lineage.tags(record), "mlflow.note.content": text}

    def _manifest(self, record: Record, t: int, task: str) -> dict[str, Any]:
        return {"study": self._plan.study, "t": t, "task": task, **self._lineage.manifest(record)}

    def _files(self, record: Record) -> dict[str, Any]:
        wanted = [WEIGHTS_FILE, CONFIG_FILE] if self._facts.log_weights else []
        return {
            "store": self._lineage.place(record),
            "files": [name for name in wanted if name in record.files],
        }

    def _datasets(self) -> list[dict[str, str]]:
        roles = {"adaptation": self._plan.adaptation, "held_out": self._plan.held_out}
        return [
            {"name": dataset, "digest": self.index.digests[dataset, split], "context": on_split(role, split)}
            for split in self._plan.splits
            for role, datasets in roles.items()
            for dataset in datasets
            if (dataset, split) in self.index.digests
        ]
