"""Turns a step of the plan into the job of an actor: the only place where content is resolved to paths.

Invariant: a job adds paths and execution options to the spec of its step, and nothing that affects the result.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from merge_service.checkpoints import WEIGHTS_FILE
from merge_service.engine import thresholds_rule
from merge_service.merging import Member, MergedAs, MergeJob, TakeJob
from merge_service.techniques import get
from pipeline.errors import StoreError
from pipeline.identity import fingerprint
from pipeline.kinds.specs import (
    EvaluateSpec,
    ExpertSpec,
    LearnSpec,
    MeasureSpec,
    MergeSpec,
    SourceSpec,
    TrainSpec,
)
from pipeline.plan.facts import cache_of, given_file
from pipeline.plan.steps import Step
from pipeline.store.artifact import Record
from pipeline.study.sections_resources import ModelResources
from pipeline.workspace.workspace import Workspace
from workers.jobs import EngineSpec, EvaluateJob, LearnJob, MeasureJob, Reading, Source, TrainJob

Job = TrainJob | TakeJob | MeasureJob | LearnJob | MergeJob | EvaluateJob


class Jobs:
    """Creates the jobs of one plan; common values are looked up once. `held` says how a merge is committed, `reserve` how many bytes
    the steps ahead need on the disk."""

    def __init__(
        self,
        workspace: Workspace,
        held: Callable[[Step], MergedAs] = lambda _: "files",
        reserve: Callable[[], int] = lambda: 0,
    ) -> None:
        self.workspace, self._held, self._reserve = workspace, held, reserve
        self._cache = str(cache_of(workspace.study).absolute())
        self._asked: dict[str, dict[str, tuple[str, Mapping[str, Any]]]] = {}
        for step in workspace.plan.steps.values():
            if step.kind == MergeSpec.kind:
                self._ask(MergeSpec.of(step.spec))

    def train(self, step: Step) -> TrainJob:
        """The job of a step that trains an expert."""
        spec, workspace = TrainSpec.of(step.spec), self.workspace
        experts = self._resources(step).experts
        steps, seconds = experts.checkpoint_pace
        return TrainJob(
            fingerprint=step.fingerprint,
            label=step.label,
            t=step.t,
            task=step.task,
            init=str(workspace.weights(spec.init)),
            base=str(workspace.weights(step.base)),
            update=self._sources(spec.update, "decoded"),
            buffer=self._sources(spec.buffer, "decoded"),
            pretraining=self._sources(spec.pretraining, "decoded"),
            recipe=spec.recipe,
            steps=spec.steps,
            seed=spec.seed,
            engine=EngineSpec(**spec.engine),
            scratch=str(workspace.scratch / step.fingerprint),
            checkpoint_every=steps,
            checkpoint_seconds=seconds,
            loaders=self._loaders(step, spec.engine["device"]),
            activation_checkpointing=experts.activation_checkpointing,
            out="",
            cache=self._cache,
            asked_limits=tuple(self._asked.get(step.fingerprint, {}).values()),
            limits=str(workspace.limits),
        )

    def take(self, step: Step) -> TakeJob:
        """The job of a step that takes in a given expert."""
        spec, workspace = ExpertSpec.of(step.spec), self.workspace
        base = self._record("base", spec.base)
        source = given_file(step.task, workspace.study.experts[step.task])
        beside = tuple(name for name in base.files if name != WEIGHTS_FILE)
        return TakeJob(step.label, source.absolute(), spec.weights, base.path, beside)

    def merge(self, step: Step) -> MergeJob:
        """The job of a step that merges experts."""
        spec, workspace = MergeSpec.of(step.spec), self.workspace
        merging = workspace.study.resources.merging
        return MergeJob(
            label=step.label,
            technique=spec.technique,
            params=spec.params,
            form=spec.form,
            base=self._member("base", spec.base),
            members=tuple(self._measured(spec, *member) for member in spec.members),
            threads=merging.threads,
            scratch=str(workspace.scratch),
            thresholds=str(workspace.limits),
            origin=get(spec.technique).origin,
            any_base=merging.any_base or self._drifts(spec),
            held=self._held(step),
            reserve=self._reserve(),
        )

    def measure(self, step: Step) -> MeasureJob:
        """The job of a step that measures experts."""
        spec, workspace = MeasureSpec.of(step.spec), self.workspace
        return MeasureJob(
            fingerprint=step.fingerprint,
            label=step.label,
            statistic=spec.statistic,
            models=tuple(str(workspace.weights(model)) for model in spec.models),
            data=tuple(self._sources(sources, "decoded") for sources in spec.data),
            params={**spec.params, "examples": spec.examples, "seed": spec.seed},
            merging=spec.merging,
            head=str(workspace.weights(spec.head)) if spec.head else "",
            threads=spec.engine["threads"],
            device=spec.engine["device"],
            scratch=str(workspace.scratch / step.fingerprint),
            cache=self._cache,
        )

    def learn(self, step: Step) -> LearnJob:
        """The job of a step that learns the coefficients of a merge."""
        spec, workspace = LearnSpec.of(step.spec), self.workspace
        return LearnJob(
            fingerprint=step.fingerprint,
            label=step.label,
            method=spec.method,
            params=spec.params,
            base=str(workspace.weights(spec.base)),
            models=tuple(str(workspace.weights(model)) for model in spec.models),
            data=tuple(self._sources(sources, "decoded") for sources in spec.data),
            scratch=str(workspace.scratch / step.fingerprint),
            before=str(workspace.weights(spec.before) / spec.file_of(spec.before)) if spec.before else "",
            threads=spec.engine["threads"],
            device=spec.engine["device"],
            cache=self._cache,
        )

    def evaluate(self, step: Step) -> EvaluateJob:
        """The job of a step that scores a model."""
        spec, workspace = EvaluateSpec.of(step.spec), self.workspace
        return EvaluateJob(
            fingerprint=step.fingerprint,
            label=step.label,
            model=str(workspace.weights(spec.model)),
            datasets=self._sources(spec.datasets, workspace.study.data.reading),
            fraction=spec.fraction,
            seed=spec.seed,
            batch_size=workspace.study.evaluation.batch_size,
            threads=self._resources(step).evaluation.threads or 1,
            device=spec.device,
            scratch=str(workspace.scratch / step.fingerprint),
            cache=self._cache,
            loaders=self._loaders(step, spec.device),
            details=tuple(spec.details),
            precision=spec.precision,
        )

    def _loaders(self, step: Step, device: str) -> int:
        """Threads that read pictures; beside a model on a CPU they would only take its cores."""
        return self._resources(step).experts.loaders if device == "cuda" else 1

    def _ask(self, merge: MergeSpec) -> None:
        """Record, for all experts of a merge, the thresholds that its technique will need; each rule once."""
        rule = thresholds_rule(merge.technique, merge.params)
        if rule is not None:
            for expert in (merge.base, *dict(merge.members).values()):
                asked = self._asked.setdefault(expert, {})
                asked.setdefault(fingerprint(rule), (merge.technique, merge.params))

    def _drifts(self, merge: MergeSpec) -> bool:
        """Whether an expert of a merge did not start from the base: its distance from the base then grows with every task."""
        experts = [self.workspace.plan.weights_step(expert) for _, expert in merge.members]
        trained = [TrainSpec.of(one.spec) for one in experts if one.kind == TrainSpec.kind]
        return any(one.init != merge.base for one in trained)

    def _member(self, name: str, fingerprint: str) -> Member:
        record = self._record(name, fingerprint)
        return Member(name, record.path, record.sha256(WEIGHTS_FILE) or "")

    def _record(self, name: str, fingerprint: str) -> Record:
        record = self.workspace.known(fingerprint)
        if record is None:
            raise StoreError(f"{name} ({fingerprint[:16]}) is not in {self.workspace.store.root}; run again")
        return record

    def _measured(self, merge: MergeSpec, name: str, expert: str) -> Member:
        """A member of a merge, with the file of its statistics where the merge reads one."""
        member, step = self._member(name, expert), dict(merge.statistics).get(name)
        if step is None:
            return member
        made = self.workspace.plan.steps[step]
        spec = LearnSpec.of(made.spec) if made.kind == LearnSpec.kind else MeasureSpec.of(made.spec)
        record, file = self._record(made.label, step), spec.file_of(expert)
        return replace(member, statistics=record.path / file, statistics_sha256=record.sha256(file))

    def _resources(self, step: Step) -> ModelResources:
        return self.workspace.study.resources.of(step.model)

    def _sources(self, entries: Sequence[SourceSpec], reading: Reading) -> tuple[Source, ...]:
        """The splits of a spec, read in this way unless the spec itself says how."""
        root = str(Path(self.workspace.study.data_root).absolute())
        classes, addresses = self.workspace.plan.classes, self.workspace.study.data.addresses or ()
        return tuple(
            Source(
                root,
                entry["dataset"],
                entry["split"],
                classes[entry["classes"]] if entry["classes"] else None,
                entry.get("reading", reading),
                addresses,
            )
            for entry in entries
        )
