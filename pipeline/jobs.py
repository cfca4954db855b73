"""From a step of the plan to the job of an actor: the only place where content becomes place.

Invariant: a job adds paths and pace to its step's spec and changes nothing that bears on the result.
"""

from pathlib import Path
from typing import Any

from merge_service.checkpoint import WEIGHTS_FILE
from merge_service.jobs import MergeJob
from merge_service.kept_limits import limits_rule
from merge_service.stream import Member
from pipeline.errors import StoreError
from pipeline.facts import cache_of
from pipeline.fingerprint import fingerprint
from pipeline.plan import Step
from pipeline.workspace import Workspace
from workers.jobs import EngineSpec, EvaluateJob, Source, TrainJob

Job = TrainJob | MergeJob | EvaluateJob


def job_of(step: Step, workspace: Workspace) -> Job:
    """What the actor of the step's kind is to do."""
    if step.kind == "train":
        return _train(step, workspace)
    return _merge(step, workspace) if step.kind == "merge" else _evaluate(step, workspace)


def _train(step: Step, workspace: Workspace) -> TrainJob:
    spec = step.spec
    return TrainJob(
        fingerprint=step.fingerprint,
        label=step.label,
        t=step.t,
        task=step.task,
        init=str(workspace.weights(spec["init"])),
        base=str(workspace.weights(step.base)),
        update=_sources(spec["update"], workspace),
        buffer=_sources(spec["buffer"], workspace),
        pretraining=_sources(spec["pretraining"], workspace),
        recipe=spec["recipe"],
        steps=spec["steps"],
        seed=spec["seed"],
        engine=EngineSpec(**spec["engine"]),
        scratch=str(workspace.scratch / step.fingerprint),
        checkpoint_every=workspace.study.resources.experts.checkpoint_every,
        out="",
        cache=str(cache_of(workspace.study).absolute()),
        asked_limits=_asked_limits(step, workspace),
        limits=str(workspace.limits),
    )


def _asked_limits(expert: Step, workspace: Workspace) -> tuple[tuple[str, dict[str, Any]], ...]:
    """Techniques and parameters of the plan's merges of this expert, each rule of thinning out once."""
    asked: dict[str, tuple[str, dict[str, Any]]] = {}
    for step in workspace.plan.steps.values():
        if step.kind == "merge" and expert.fingerprint in step.inputs.values():
            rule = limits_rule(step.spec["technique"], step.spec["params"])
            if rule is not None:
                asked.setdefault(fingerprint(rule), (step.spec["technique"], step.spec["params"]))
    return tuple(asked.values())


def _merge(step: Step, workspace: Workspace) -> MergeJob:
    spec = step.spec
    return MergeJob(
        label=step.label,
        technique=spec["technique"],
        params=spec["params"],
        form=spec["form"],
        base=_member("base", spec["base"], workspace),
        members=tuple(_member(name, fp, workspace) for name, fp in spec["inputs"]),
        threads=workspace.study.resources.merging.threads,
        scratch=str(workspace.scratch),
        limits=str(workspace.limits),
    )


def _member(name: str, fingerprint: str, workspace: Workspace) -> Member:
    record = workspace.store.find(fingerprint)
    if record is None:
        raise StoreError(f"{name} ({fingerprint[:16]}) is not in {workspace.store.root}; run again")
    return Member(name, record.path, record.sha256(WEIGHTS_FILE) or "")


def _evaluate(step: Step, workspace: Workspace) -> EvaluateJob:
    spec, resources = step.spec, workspace.study.resources.evaluation
    return EvaluateJob(
        fingerprint=step.fingerprint,
        label=step.label,
        model=str(workspace.weights(spec["model"])),
        datasets=_sources(spec["datasets"], workspace),
        fraction=spec["fraction"],
        seed=spec["seed"],
        batch_size=workspace.study.evaluation.batch_size,
        threads=resources.threads,
        device=spec["device"],
        scratch=str(workspace.scratch / step.fingerprint),
        cache=str(cache_of(workspace.study).absolute()),
    )


def _sources(entries: list[dict[str, Any]], workspace: Workspace) -> tuple[Source, ...]:
    root = str(Path(workspace.study.data_root).absolute())
    classes = workspace.plan.classes
    return tuple(
        Source(
            root, entry["dataset"], entry["split"], classes[entry["classes"]] if entry["classes"] else None
        )
        for entry in entries
    )
