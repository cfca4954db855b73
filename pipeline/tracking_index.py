"""Who uses which step of a plan, and under which names tracking files it: the part of tracking that only looks.

Invariant: a function of the plan alone.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from pipeline.steps import BASE, TEST, Plan, Point, TrajectoryPlan
from pipeline.tracking_names import expert_names, trajectory_names

STUDY = "study"
EXPERTS = "experts"
_DIGEST_CHARACTERS = 12  # MLflow shows all of them and allows 36
Use = tuple[TrajectoryPlan, Point]


@dataclass
class Index:
    """Look-ups over a plan, made once: a plan may have thousands of points.

    `users` of a step at points, `experts` the first use of each unique expert, `scored` the experts whose own task an
    evaluation measures, `digests` those of all evaluated (dataset, split), `base_evaluations` what scores each (base, split),
    `splits` the split of each evaluation.
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
        for step in self.plan.steps.values():
            for source in step.spec["datasets"] if step.kind == "evaluate" else ():
                self.digests[source["dataset"], source["split"]] = source["digest"][:_DIGEST_CHARACTERS]

    def run_keys(self) -> Iterable[str]:
        """The keys of all runs of this plan."""
        yield from (STUDY, EXPERTS)
        yield from map(trajectory_key, self.plan.trajectories)
        yield from map(expert_key, self.experts)

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
    """The steps that a point needs done."""
    return {fp for fp in (point.train, point.deployed, point.merge, point.evaluate) if fp and fp != BASE}


def trajectory_key(trajectory: TrajectoryPlan) -> str:
    return f"trajectory/{trajectory.id}"


def expert_key(fingerprint: str) -> str:
    return f"expert/{fingerprint[:32]}"


def base_key(fingerprint: str) -> str:
    """The model that stands for a base, at every t of the trajectories that serve it."""
    return f"base/{fingerprint[:16]}"


def model_key(trajectory: TrajectoryPlan, point: Point) -> str | None:
    """The model that stands for a point. None at t=0: there the base's scores are the study's, filed once."""
    if point.deployed == BASE:
        return None if point.t == 0 else base_key(trajectory.base)
    return f"{trajectory.id}/t{point.t}"


def scored_model(trajectory: TrajectoryPlan, point: Point) -> str | None:
    """The same, to file scores with: the base is the model of trajectories on every split, so only scores on test are filed with it."""
    return None if point.deployed == BASE and trajectory.split != TEST else model_key(trajectory, point)
