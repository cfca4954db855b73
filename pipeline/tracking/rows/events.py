"""A study as rows for the tracker: a pure projection of (plan, records), without MLflow or a clock.

- The study is the parent run. Below it are one run per trajectory, and one run that holds one run per unique expert.
- Every checkpoint that a trajectory serves at t >= 1 is a model of its own, found by its name (`best_in_time-t3-photos_b`), even
  if it has the bytes of another (an expert that is served as it is). The base is logged once, for every t of a trajectory that
  serves it (`zero_shot`).
- The results of a trajectory at t are metrics of its run with step = t, attached to the model as well.

Invariant: the same plan and the same records give the same rows under the same keys, in whatever order and however often steps
are recorded. Every timestamp of a measurement comes from its record.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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
from pipeline.tracking.rows.lineage import Checkpoint, Described, Lineage
from pipeline.tracking.rows.names import (
    best_note,
    flat,
    metric_name,
    on_split,
    plain,
    served_note,
    strategy_tags,
    trajectory_note,
)
from pipeline.tracking.rows.rows import Metrics, Rows, Run


@dataclass(frozen=True)
class StudyFacts:
    """What the projection needs besides the plan. `settings` is the resolved study file as plain values; `store` is where
    artifacts are, as text: relative to OUT, or a path or URL.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    code_version: str = ""
    log_weights: bool = True
    recipes: frozenset[str] = frozenset()
    store: str = "store"
    registry: Mapping[str, str] | None = None
    """{"name", "by", "alias"} of the registered model that gets the best trajectory as a version; None without one."""
    title: str | None = None
    """The name of the parent run; None for the study's."""
    git: Mapping[str, str] = field(default_factory=dict)
    """MLflow's tags of the commit of the code."""
    earlier: tuple[str, ...] = ()
    """The names of the parent runs of other plans that OUT held before."""


@dataclass
class _Reached:
    """How far a trajectory is recorded: points scored without a gap, the time of the newest of them, steps still missing."""

    over_time: OverTime
    waiting: set[str]
    places: int = 0
    stamp: int = 0
    end: int = 0


class Projection:
    """Rows of one plan. Its only state is the records so far. `bases` are the records of the bases, by fingerprint."""

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
            **facts.git,
        }
        self._described = Described(self._lineage, self._common, facts.log_weights, facts.recipes)
        self._experts = ExpertRows(self.index, self.rows, self._records, self._described)

    def started(self, now_ms: int) -> list[Row]:
        """The parent run, the runs of all trajectories, and the base models. Only the `now_ms` of the first call counts.

        The runs start a millisecond apart, because the UI lists the newest first: trajectories in the study's order, then the
        experts.
        """
        tags = {**self._common, "kind": STUDY, "mlflow.note.content": self._note()}
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

    def _note(self) -> str:
        note = (
            f"{len(self._plan.trajectories)} trajectories over {len(self.index.experts)} experts. Unfold this run to see"
            " them; the step of every metric of a trajectory is t. **Models** lists every expert and every served checkpoint by"
            " trajectory, t and task."
        )
        if not self._facts.earlier:
            return note
        return f"{note}\n\nThe study was changed in its OUT: {', '.join(self._facts.earlier)} came before; those runs and models stay."

    def settings(self) -> dict[str, str]:
        """The study's settings as MLflow parameters, without those of the grid, which the trajectories have."""
        settings = flat(self._facts.settings)
        return {key: value for key, value in settings.items() if not key.startswith(("grid.", "storage."))}

    def finished(self, table: str | None = None, best: str | None = None) -> list[Row]:
        """The rows of a finished study; `table` is its results as CSV, `best` the trajectory to register."""
        end = max(record.created_ms for record in (*self._bases.values(), *self._records.values()))
        rows = [] if table is None else [self.rows.artifact(STUDY, "results.csv", end, text=table)]
        several = mixed_text(counted((*self._bases.values(), *self._records.values())))
        if several:
            rows.append(self.rows.log(STUDY, "versions", Metrics(end), tags={"library_versions": several}))
        rows += [self.rows.status(key, "FINISHED", end) for key in (EXPERTS, STUDY)]
        return rows if best is None or self._facts.registry is None else rows + self._best_rows(best, end)

    def failed(self, step: Step, error: str, at_ms: int) -> list[Row]:
        """A step failed for good: its expert's run, every trajectory that uses it, and the study are marked as failed."""
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
            rows += self._experts.trained(step, record)
        if step.kind == "evaluate":
            rows += self._experts.evaluated(step, record)
        if step.kind == "measure":
            rows += self._experts.measured(step, record)
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
        settings = self._plan.settings.get(trajectory.settings_id, {})
        params = {
            **flat(settings),
            **searchable,
            **flat(trajectory.params, "technique."),
            **flat(trajectory.axes),
        }
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
        self._add_learned(metrics, record, point.t)
        model = model_key(trajectory, point) if point.merge == point.deployed else None
        return self.rows.log(trajectory_key(trajectory), f"t{point.t}/merge", metrics, model)

    def _add_learned(self, metrics: Metrics, merge: Record, t: int) -> None:
        """What learning the coefficients of a merge took, and how far the loss fell."""
        for fingerprint in {*merge.inputs.values()} & self._records.keys() & self._plan.steps.keys():
            step, result = self._plan.steps[fingerprint], self._records[fingerprint].result
            if step.kind == "learn":
                for name, value in zip(("learning/first_loss", "learning/last_loss"), result["loss"]):
                    metrics.add(name, value, t)
                metrics.add("learning/seconds", result["seconds"], t)
                metrics.add("learning/gflops", step.gflops, t)

    def _over_time_rows(self, trajectory: TrajectoryPlan) -> list[Row]:
        """Forgetting and backward transfer at every further t up to which all evaluations are done."""
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
        """The metrics of an evaluation. If they are `shared` with other splits, their names contain the split."""
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
        checkpoint = Checkpoint(record, point.t, point.task, trajectory.id)
        files = self._described.files(checkpoint)
        body = {
            "name": self.index.model_names[trajectory.id, point.t],
            "type": "expert" if record.kind in ("train", "expert") else "merged",
            "step": point.t,
            "params": {**searchable, **flat(trajectory.params, "technique.")},
            "tags": {
                **searchable,
                **self._described.tags(checkpoint, served_note(name, point)),
            },
            **files,
            "manifest": {**files["manifest"], "strategy": strategy},
            "inputs": [] if point.train is None else [expert_key(point.train)],
        }
        stamp = record.created_ms
        return self.rows.model(key, trajectory_key(trajectory), stamp, body)

    def _best_rows(self, best: str, stamp: int) -> list[Row]:
        """The last model of the best trajectory, as a version of the study's registered model, and its alias."""
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
        body = {"name": registry["name"], "tags": tags, "note": note, "parent": STUDY}
        model, run = model_key(trajectory, point), trajectory_key(trajectory)
        if point.deployed == BASE:
            model, run = base_key(trajectory.base), STUDY
        assert model is not None, "only the base's t=0 has none"
        return [
            self._best_row(trajectory, stamp, best_note(name, by, f"{registry['name']}@{registry['alias']}")),
            self.rows.register(model, run, stamp, body),
            self.rows.alias(model, stamp, registry["name"], registry["alias"]),
        ]

    def _best_row(self, best: TrajectoryPlan, stamp: int, note: str) -> Row:
        """Metrics of the best trajectory for the study's own run, from t=1; at t=0 every trajectory is the base."""
        metrics = Metrics(stamp)
        for point in best.points[1:]:
            scored = self._scores(self._records[point.evaluate], point.t, shared=True)
            metrics.values += scored.values
        tags = {
            "best.trajectory": self.index.names[best.id],
            "mlflow.note.content": f"{note}\n\n{self._note()}",
        }
        return self.rows.log(STUDY, "best", metrics, tags=tags)

    def _base_model_row(self, base: Record) -> Row:
        model = self._plan.bases[base.fingerprint].model
        several = f"-{model}" if len(self._bases) > 1 else ""
        searchable, said = {"t": "0", "task": BASE}, seen(model, base) or {}
        how = flat({key: value for key, value in said.items() if key != "notes"}, "base.")
        first = next(one.id for one in self._plan.trajectories if one.base == base.fingerprint)
        checkpoint = Checkpoint(base, 0, BASE, first)
        body = {
            "name": plain(f"{BASE}-{self._plan.study}{several}"),
            "type": BASE,
            "step": 0,
            "is_input": True,
            "params": searchable | {key: value[:250] for key, value in how.items()},
            "tags": {
                **searchable,
                **self._described.tags(
                    checkpoint, " ".join(["The base model the study starts from.", sentence_of(said)]).strip()
                ),
            },
            **self._described.files(checkpoint),
        }
        return self.rows.model(base_key(base.fingerprint), STUDY, base.created_ms, body)

    def _datasets(self) -> list[dict[str, str]]:
        roles = {"adaptation": self._plan.adaptation, "held_out": self._plan.held_out}
        return [
            {"name": dataset, "digest": self.index.digests[dataset, split], "context": on_split(role, split)}
            for split in self._plan.splits
            for role, datasets in roles.items()
            for dataset in datasets
            if (dataset, split) in self.index.digests
        ]
