"""How steps of each kind are carried out, one row per kind of `kinds.table`: the workers, the job, and the timeout.

A lane is a queue of steps that the same workers can carry out. Lanes of equal shape share a pool, so a worker that has trained an
expert can score a checkpoint next.

Invariant: no result depends on a row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from cluster.capacity import Shape
from cluster.pool import Pool, Terms
from merge_service.service import Merger
from merge_service.techniques import get as technique_called
from pipeline.kinds.results import (
    EvaluateResult,
    ExpertResult,
    LearnResult,
    MeasureResult,
    MergeResult,
    TrainResult,
)
from pipeline.kinds.specs import MergeSpec
from pipeline.plan.steps import Step
from pipeline.run.jobs import Job, Jobs
from pipeline.study.sections_resources import ResourcesSection as Resources
from workers.actors import Worker, gather

Series = dict[str, int]
"""Series of merges by name, numbered in the order of their first appearance."""


@dataclass(frozen=True)
class Lane:
    """Steps of one kind, and of one model or one merge actor. `cap` is how many may run at a time, None any number.

    `memory` is the limit of each worker in bytes; None is that of its machine.
    """

    name: str
    kind: str
    pool: str
    shape: Shape
    cap: int | None
    memory: int | None = None


@dataclass(frozen=True)
class Carrier:
    """How steps of one kind are carried out.

    `what` names such a step in messages, `section` the part of `resources` that applies to it. `timeout` is how many
    seconds a step may run without progress. `headline` is the main result of a step as text.
    """

    what: str
    section: str
    lane: Callable[[Step, Resources, Series], Lane]
    pool: Callable[[Lane, bool], Pool]
    job: Callable[[Jobs, Step], Job]
    timeout: Callable[[Step, Resources], float]
    headline: Callable[..., str]


def _train_lane(step: Step, resources: Resources, series: Series) -> Lane:
    experts = resources.of(step.model).experts
    shape = Shape(experts.workers, experts.cpus, experts.gpus, experts.threads)
    return _worker_lane(step, shape, experts.groups, experts.memory)


def _evaluate_lane(step: Step, resources: Resources, series: Series) -> Lane:
    found = resources.of(step.model)
    experts, evaluation = found.experts, found.evaluation
    shape = Shape(1, evaluation.cpus or 0, evaluation.gpus or 0, evaluation.threads or 1)
    cap = evaluation.actors
    if cap == "auto" and resources.autoscaling:
        cap = experts.groups
    return _worker_lane(step, shape, cap, experts.memory)


def _worker_lane(step: Step, shape: Shape, cap: int | Literal["auto"], memory: int | None) -> Lane:
    pool = f"worker {shape}, {shape.threads} threads, {memory or 'any'} bytes"
    if cap == "auto":
        most = 1 if shape.is_free else None
    else:
        most = cap
    return Lane(f"{step.kind} {step.model}", step.kind, pool, shape, most, memory)


def _merge_lane(step: Step, resources: Resources, series: Series) -> Lane:
    """Merges of a growing list of experts go to the actor that holds the state of the list."""
    spec = MergeSpec.of(step.spec)
    alone = not spec.members or (spec.form == "fold" and not technique_called(spec.technique).resumes)
    named = step.fingerprint if alone else spec.members[0][1]
    number = series.setdefault(named, len(series))
    name = f"merge {number % resources.merging.actors}"
    return Lane(name, step.kind, name, Shape(1, 0), 1, resources.merging.memory)


def _take_lane(step: Step, resources: Resources, series: Series) -> Lane:
    return Lane("take", step.kind, "take", Shape(1, 0), 1, resources.merging.memory)


def _workers(lane: Lane, patient: bool) -> Pool:
    shape, device = lane.shape, "cuda" if lane.shape.gpus else "cpu"
    return Pool(
        "worker", Worker, lambda actor, rank: actor.remote(rank, shape.world, shape.threads, device, shape.gpus),
        shape, Terms(gather, patient=patient, memory=lane.memory),
    )  # fmt: skip


def _mergers(lane: Lane, patient: bool) -> Pool:
    terms = Terms(patient=patient, memory=lane.memory)
    return Pool(lane.name, Merger, lambda actor, _: actor.remote(), lane.shape, terms)


def _trained(result: TrainResult) -> str:
    return f"{result['steps']} steps, loss {result['loss'][-1][1]:.3f}, {result['samples_per_second']:.0f} samples/s"


def _merged(result: MergeResult) -> str:
    norm = result.get("merged_norm")
    return "merged" if norm is None else f"norm {norm:.3f}"


def _taken(result: ExpertResult) -> str:
    return f"norm {result['norms']['norm']:.3f}"


def _measured(result: MeasureResult) -> str:
    rows = sum(result["examples"])
    return f"{result['tensors']} tensors over {rows} samples, {result['bytes'] / 1e6:.1f} MB"


def _learned(result: LearnResult) -> str:
    moved = ", loss {:.3f} to {:.3f}".format(*result["loss"]) if result["loss"] else ""
    return f"{result['steps']} steps on {result['examples']} samples{moved}"


def _scored(result: EvaluateResult) -> str:
    scores = result["scores"]
    return f"mean of {len(scores)} scores {sum(scores.values()) / len(scores):.3f}"


CARRIERS = {
    "train": Carrier(
        "an expert", "experts", _train_lane, _workers, lambda jobs, step: jobs.train(step),
        lambda step, resources: resources.of(step.model).experts.timeout, _trained,
    ),
    "expert": Carrier(
        "a given expert", "merging", _take_lane, _mergers, lambda jobs, step: jobs.take(step),
        lambda step, resources: resources.merging.timeout, _taken,
    ),
    "measure": Carrier(
        "a measurement", "evaluation", _evaluate_lane, _workers, lambda jobs, step: jobs.measure(step),
        lambda step, resources: resources.of(step.model).evaluation.timeout, _measured,
    ),
    "learn": Carrier(
        "a learned merge", "evaluation", _evaluate_lane, _workers, lambda jobs, step: jobs.learn(step),
        lambda step, resources: resources.of(step.model).evaluation.timeout, _learned,
    ),
    "merge": Carrier(
        "a merge", "merging", _merge_lane, _mergers, lambda jobs, step: jobs.merge(step),
        lambda step, resources: resources.merging.timeout, _merged,
    ),
    "evaluate": Carrier(
        "an evaluation", "evaluation", _evaluate_lane, _workers, lambda jobs, step: jobs.evaluate(step),
        lambda step, resources: resources.of(step.model).evaluation.timeout, _scored,
    ),
}  # fmt: skip
"""The row of every kind of step that a plan carries out."""
