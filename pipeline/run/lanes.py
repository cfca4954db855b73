"""Where each step of a plan is carried out: lanes of steps, and the pools of workers behind them.

A lane is a queue of steps that the same workers can carry out; lanes of equal shape share a pool, so that a worker which
has trained an expert scores a checkpoint next. Invariant: whatever the lanes say, no result depends on it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.capacity import Capacity, Shape
from cluster.pool import Pool, Terms
from cluster.session import ClusterError
from merge_service.service import Merger
from pipeline.plan.steps import Step
from pipeline.study.config import Study
from workers.actors import Worker, gather


@dataclass(frozen=True)
class Lane:
    """Steps of one kind, and of one model or one merge actor. `cap` is how many may run at a time, None any number.

    `memory` is what each of their workers may have in bytes, None what its machine has.
    """

    name: str
    kind: str
    pool: str
    shape: Shape
    cap: int | None
    memory: int | None = None


class Lanes:
    """The lanes of a plan's steps."""

    def __init__(self, study: Study, steps: Mapping[str, Step]) -> None:
        self.study = study
        self.by_name: dict[str, Lane] = {}
        self._series: dict[str, int] = {}
        self._of: dict[str, Lane] = {}
        self.add(steps)

    def add(self, steps: Mapping[str, Step]) -> None:
        """Give these steps a lane too."""
        for fingerprint, step in steps.items():
            if fingerprint not in self._of:
                self._of[fingerprint] = self._lane(step)

    def of(self, step: Step) -> str:
        """The name of a step's lane."""
        return self._of[step.fingerprint].name

    def check(self, capacity: Capacity) -> None:
        """Raise ClusterError if a step can never have a place, with what it wants and what there is."""
        for lane in sorted(self.by_name.values(), key=lambda lane: lane.kind, reverse=True):
            lacking = capacity.lacking(lane.shape)
            if lacking:
                what = "an expert" if lane.kind == "train" else "an evaluation"
                key = "experts" if lane.kind == "train" else "evaluation"
                raise ClusterError(
                    f"{what} ({lane.name}) wants {lane.shape}, which do not fit into {capacity}: {lacking}. Lower "
                    f"resources.{key}, add nodes, or set resources.autoscaling if nodes will come"
                )

    def pools(self, patient: bool) -> dict[str, Pool]:
        """One pool for every shape, and one for every merge actor; none of them has started anything."""
        return {lane.pool: _pool(lane, patient) for lane in self.by_name.values()}

    def _lane(self, step: Step) -> Lane:
        model = step.model
        name = self._merge_actor(step) if step.kind == "merge" else f"{step.kind} {model}"
        if name not in self.by_name:
            self.by_name[name] = self._new(name, step.kind, model)
        return self.by_name[name]

    def _new(self, name: str, kind: str, model: str) -> Lane:
        if kind == "merge":
            return Lane(name, kind, name, Shape(1, 0), 1, self.study.resources.merging.memory)
        found = self.study.resources.of(model)
        experts, evaluation = found.experts, found.evaluation
        if kind == "train":
            shape = Shape(experts.workers, experts.cpus, experts.gpus, experts.threads)
            cap = experts.groups
        else:
            shape = Shape(1, evaluation.cpus or 0, evaluation.gpus or 0, evaluation.threads or 1)
            cap = evaluation.actors
            if cap == "auto" and self.study.resources.autoscaling:
                cap = experts.groups
        if cap == "auto":
            cap = 1 if shape.is_free else None
        pool = f"worker {shape}, {shape.threads} threads, {experts.memory or 'any'} bytes"
        return Lane(name, kind, pool, shape, cap, experts.memory)

    def _merge_actor(self, step: Step) -> str:
        """The merge actor of a step: merges of a growing list of experts go where the state of the list is kept."""
        members: list[Any] = step.spec.get("inputs") or [[None, step.fingerprint]]
        series = step.fingerprint if step.spec.get("form") == "fold" else members[0][1]
        number = self._series.setdefault(series, len(self._series))
        return f"merge {number % self.study.resources.merging.actors}"


def _pool(lane: Lane, patient: bool) -> Pool:
    shape = lane.shape
    if lane.kind == "merge":
        terms = Terms(patient=patient, memory=lane.memory)
        return Pool(lane.name, Merger, lambda actor, _: actor.remote(), shape, terms)
    device = "cuda" if shape.gpus else "cpu"
    return Pool(
        "worker", Worker, lambda actor, rank: actor.remote(rank, shape.world, shape.threads, device),
        shape, Terms(gather, patient=patient, memory=lane.memory),
    )  # fmt: skip
