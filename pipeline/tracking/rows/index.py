"""Which points use a step of a plan, and the keys and names of runs and models in tracking.

Invariant: a function of the plan alone.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from pipeline.plan.steps import BASE, TEST, Plan, Point, TrajectoryPlan
from pipeline.tracking.rows.names import (
    expert_model_name,
    expert_names,
    model_names,
    trajectory_names,
)

STUDY = "study"
EXPERTS = "experts"
DIGEST_CHARACTERS = 12  # MLflow shows all of them and allows 36
Use = tuple[TrajectoryPlan, Point]


@dataclass
class Index:
    """Look-ups over a plan, computed once, because a plan may have thousands of points.

    `users` are the points that use a step, `experts` the first use of each unique expert, `scored` the experts whose own task an
    evaluation measures, `digests` those of all evaluated (dataset, split), `base_evaluations` the step that scores each (base,
    split), `splits` the split of each evaluation.
    """

    plan: Plan
    fingerprint: str = field(init=False)
    users: dict[str, list[Use]] = field(init=False, default_factory=dict)
    experts: dict[str, Use] = field(init=False, default_factory=dict)
    scored: dict[str, set[str]] = field(init=False, default_factory=dict)
    digests: dict[tuple[str, str], str] = field(init=False, default_factory=dict)
    base_evaluations: dict[tuple[str, str], str] = field(init=False, default_factory=dict)
    splits: dict[str, str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.fingerprint = self.plan.fingerprint
        for trajectory in self.plan.trajectories:
            for point in trajectory.points:
                self._add(trajectory, point)
        self.names = trajectory_names(self.plan.trajectories)
        self.expert_names = expert_names(self.experts, self.plan.steps, self.plan.trajectories)
        self.model_names = model_names(self.plan.trajectories, self.names)
        self.expert_model_names = {fp: expert_model_name(name) for fp, name in self.expert_names.items()}
        for step in self.plan.steps.values():
            for source in step.spec["datasets"] if step.kind == "evaluate" else ():
                self.digests[source["dataset"], source["split"]] = source["digest"][:DIGEST_CHARACTERS]

    def run_keys(self) -> Iterable[str]:
        """The keys of all runs of this plan."""
        yield from (STUDY, EXPERTS)
        yield from map(trajectory_key, self.plan.trajectories)
        yield from map(expert_key, self.experts)

    def model_of(self, fingerprint: str) -> str | None:
        """The model of these weights: a base, an expert, or a merge that some trajectory serves."""
        if fingerprint in self.plan.bases:
            return base_key(fingerprint)
        if fingerprint in self.experts:
            return expert_key(fingerprint)
        served = ((t, p) for t, p in self.users.get(fingerprint, ()) if p.deployed == fingerprint)
        return next((model_key(trajectory, point) for trajectory, point in served), None)

    def used_by(self, expert: str) -> list[str]:
        """The names of the trajectories that use an expert."""
        return list({t.id: self.names[t.id] for t, p in self.users[expert] if p.train == expert}.values())

    def _add(self, trajectory: TrajectoryPlan, point: Point) -> None:
        for step in steps_of(point):
            self.users.setdefault(step, []).append((trajectory, point))
        self.splits |= {one: trajectory.split for one in (point.evaluate, point.own) if one}
        if point.train is not None:
            self.experts.setdefault(point.train, (trajectory, point))
            if point.own is not None:
                self.scored.setdefault(point.own, set()).add(point.train)
        if point.t == 0:
            self.base_evaluations[trajectory.base, trajectory.split] = point.evaluate


def steps_of(point: Point) -> set[str]:
    """The steps that a point needs."""
    return {fp for fp in (point.train, point.deployed, point.merge, point.evaluate) if fp and fp != BASE}


def trajectory_key(trajectory: TrajectoryPlan) -> str:
    return f"trajectory/{trajectory.id}"


def expert_key(fingerprint: str) -> str:
    """The key of an expert's run, and of its model."""
    return f"expert/{fingerprint[:32]}"


def base_key(fingerprint: str) -> str:
    """The key of a base's model, at every t of the trajectories that serve it."""
    return f"base/{fingerprint[:16]}"


def model_key(trajectory: TrajectoryPlan, point: Point) -> str | None:
    """The key of a point's model. None at t=0: the base's scores belong to the study and are recorded once."""
    if point.deployed == BASE:
        return None if point.t == 0 else base_key(trajectory.base)
    return f"{trajectory.id}/t{point.t}"


def scored_model(trajectory: TrajectoryPlan, point: Point) -> str | None:
    """The model that gets a point's scores. The base is the model of trajectories on every split, so only its scores on test are
    attached to it.
    """
    return None if point.deployed == BASE and trajectory.split != TEST else model_key(trajectory, point)
