"""From a step of the plan to the job of an actor: the only place where content becomes place.

Invariant: a job adds paths and pace to its step's spec and changes nothing that bears on the result.
"""

from pathlib import Path
from typing import Any

from merge_service.checkpoints import WEIGHTS_FILE
from merge_service.engine import limits_rule
from merge_service.merging import Member, MergeJob
from merge_service.techniques import get
from pipeline.errors import StoreError
from pipeline.identity import fingerprint
from pipeline.plan.facts import cache_of
from pipeline.plan.steps import Step
from pipeline.study.sections import ModelResources
from pipeline.workspace.workspace import Workspace
from workers.jobs import EngineSpec, EvaluateJob, Source, TrainJob

Job = TrainJob | MergeJob | EvaluateJob


class Jobs:
    """Makes the jobs of one plan; what all of them need is looked up once."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self._asked: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {}
        for step in workspace.plan.steps.values():
            rule = limits_rule(step.spec["technique"], step.spec["params"]) if step.kind == "merge" else None
            if rule is not None:
                self._ask(step, fingerprint(rule))

    def of(self, step: Step) -> Job:
        """What the actor of the step's kind is to do."""
        if step.kind == "train":
            return _train(step, self.workspace, tuple(self._asked.get(step.fingerprint, {}).values()))
        return _merge(step, self.workspace) if step.kind == "merge" else _evaluate(step, self.workspace)

    def _ask(self, merge: Step, rule: str) -> None:
        """A merge will ask this rule's thresholds of all its experts; each rule once."""
        for expert in merge.inputs.values():
            self._asked.setdefault(expert, {}).setdefault(
                rule, (merge.spec["technique"], merge.spec["params"])
            )


def _train(step: Step, workspace: Workspace, asked: tuple[tuple[str, dict[str, Any]], ...]) -> TrainJob:
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
        checkpoint_every=_resources(step, workspace).experts.checkpoint_every,
        out="",
        cache=str(cache_of(workspace.study).absolute()),
        asked_limits=asked,
        limits=str(workspace.limits),
    )


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
        origin=get(spec["technique"]).origin,
        any_base=workspace.study.resources.merging.any_base or _wanders(step, workspace),
    )


def _wanders(step: Step, workspace: Workspace) -> bool:
    """Whether an expert of a merge began elsewhere than at the base: it lies farther from it with every task, as it should."""
    experts = [workspace.plan.weights_step(fp) for _, fp in step.spec["inputs"]]
    return any(one.kind == "train" and one.spec["init"] != step.base for one in experts)


def _member(name: str, fingerprint: str, workspace: Workspace) -> Member:
    record = workspace.known(fingerprint)
    if record is None:
        raise StoreError(f"{name} ({fingerprint[:16]}) is not in {workspace.store.root}; run again")
    return Member(name, record.path, record.sha256(WEIGHTS_FILE) or "")


def _resources(step: Step, workspace: Workspace) -> ModelResources:
    return workspace.study.resources.of(step.model)


def _evaluate(step: Step, workspace: Workspace) -> EvaluateJob:
    spec = step.spec
    return EvaluateJob(
        fingerprint=step.fingerprint,
        label=step.label,
        model=str(workspace.weights(spec["model"])),
        datasets=_sources(spec["datasets"], workspace),
        fraction=spec["fraction"],
        seed=spec["seed"],
        batch_size=workspace.study.evaluation.batch_size,
        threads=_resources(step, workspace).evaluation.threads or 1,
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
