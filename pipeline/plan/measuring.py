"""The measure steps of one cell: one for every expert whose merges need a statistic, shared like any other step.

Invariant: a measurement reads the training split of the expert's own task and nothing else; one of all experts together reads those of
the tasks so far, which a strategy without replay may not (`grid.forbidden_data`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_service.techniques import Evidence
from pipeline.errors import PlanError
from pipeline.kinds.specs import MeasureSpec, SourceSpec, Spec
from pipeline.kinds.table import KINDS
from pipeline.plan.steps import RECORD_BYTES, TRAIN, About, World
from pipeline.study.sections import StatisticsSection
from pipeline.study.streams import StreamTask

EXAMPLES, GRADIENT_EXAMPLES = 256, 128
PASSES = {"gram": 0.86, "fisher": 1.0, "kfac": 1.86, "gradient": 1.0, "layer_gram": 0.86}
"""The cost of an example in training samples (a forward and a backward pass): of gram a forward pass and the products x xᵀ."""
BYTES = {"gram": 1.45, "fisher": 1.0, "kfac": 3.0, "gradient": 1.0, "layer_gram": 1.3}
"""The size of a file in sizes of the checkpoint, at most."""


@dataclass(frozen=True)
class Measuring:
    """How the experts of a cell are measured: `statistic` says for what, `engine` on which device with how many threads."""

    asked: Evidence
    how: StatisticsSection
    engine: Mapping[str, Any]

    @property
    def examples(self) -> int:
        """How many rows are drawn of each task at most."""
        default = GRADIENT_EXAMPLES if self.asked.kind == "gradient" else EXAMPLES
        return self.how.examples or default

    @property
    def by_classes(self) -> bool:
        """Whether gradients of class scores are taken, which captions do not have."""
        return self.asked.kind in ("fisher", "kfac", "gradient")

    def params(self) -> dict[str, str]:
        """What bears on the numbers of this kind."""
        found: dict[str, str] = {"precision": self.how.precision}
        if self.by_classes:
            labels = "given" if self.asked.labels else self.how.labels
            found |= {"labels": labels, "towers": self.how.towers}
        return found


@dataclass(frozen=True)
class Measured:
    """What one step measures: models with their data, oldest first, and the parameters of the merge where they bear on it."""

    models: Sequence[str]
    data: Sequence[Sequence[SourceSpec]]
    merging: Mapping[str, Any]


def measure_spec(measuring: Measuring, what: Measured, base: str) -> MeasureSpec:
    """The spec of a step."""
    params = measuring.params()
    return MeasureSpec(
        version=KINDS[MeasureSpec.kind].revision,
        statistic=measuring.asked.kind,
        models=[*what.models],
        data=[*what.data],
        examples=measuring.examples,
        seed=measuring.how.seed,
        params=params,
        merging=what.merging,
        head=base if params.get("towers") == "image" else "",
        engine=measuring.engine,
    )


class Measurer:
    """Adds the measure steps of one cell. `used` are these, with their GFLOPs."""

    def __init__(self, add: Callable[[Spec, About], str], world: World, measuring: Measuring) -> None:
        self._add, self._world, self._measuring = add, world, measuring
        self._known: dict[int, str] = {}
        self.used: dict[str, float | None] = {}

    def of(self, t: int, expert: str, task: StreamTask, data: Sequence[SourceSpec]) -> str:
        """The step that measures the expert of task t, or the base on its data."""
        if t not in self._known:
            model = self._world.base.fingerprint if self._measuring.asked.of == "base" else expert
            self._known[t] = self._step(t, [task], Measured([model], [data], {}))
        return self._known[t]

    def together(self, tasks: Sequence[StreamTask], what: Measured) -> str:
        """The step that measures all experts so far on their tasks, for one merge."""
        return self._step(len(tasks), tasks, what)

    def _step(self, t: int, tasks: Sequence[StreamTask], what: Measured) -> str:
        kind, world = self._measuring.asked.kind, self._world
        self._check(tasks)
        spec = measure_spec(self._measuring, what, world.base.fingerprint)
        of = "base on the data" if self._measuring.asked.of == "base" else "expert"
        about = About(
            f"t{t}-{kind}-{tasks[-1].name}",
            f"t{t} {tasks[-1].name}: {kind} of {f'{len(tasks)} experts' if len(tasks) > 1 else f'the {of}'}",
            t,
            tasks[-1].name,
            gflops=self._cost(tasks),
            disk_bytes=int(BYTES[kind] * world.facts.weights_bytes * len(what.models)) + RECORD_BYTES,
            base=world.base.fingerprint,
            model=world.model,
        )
        fingerprint = self._add(spec, about)
        self.used[fingerprint] = about.gflops
        return fingerprint

    def _cost(self, tasks: Sequence[StreamTask]) -> float | None:
        """GFLOPs; None if the cost of a training sample was not measured."""
        sample, how, found = sample_cost(self._world), self._measuring, 0.0
        if sample is None:
            return None
        for task in tasks:
            passes = classes_of(self._world, task) if how.params().get("labels") == "expectation" else 1
            found += PASSES[how.asked.kind] * sample * rows_of(self._world, task, how.examples) * passes
        return found

    def _check(self, tasks: Sequence[StreamTask]) -> None:
        """Raise PlanError for a task on whose data this statistic cannot be measured."""
        if not self._measuring.by_classes:
            return
        what = f"{self._measuring.asked.kind} takes gradients of class scores"
        refuse_captions(self._world, tasks, what, "gram or no data")


def sample_cost(world: World) -> float | None:
    """GFLOPs of a forward and a backward pass of one sample; None if that was not measured."""
    costs = world.facts.gflops_per_sample
    return costs.get("all", max(costs.values())) if costs else None


def rows_of(world: World, task: StreamTask, most: int) -> int:
    """How many rows are drawn of the training split of a task."""
    there = sum(world.datasets[part.dataset].samples.get(TRAIN, 0) for part in task.parts)
    return min(most, there or most)


def classes_of(world: World, task: StreamTask) -> int:
    """How many classes a task has."""
    return sum(
        len(part.classes) if part.classes is not None else max(1, world.datasets[part.dataset].classes)
        for part in task.parts
    )


def refuse_captions(world: World, tasks: Sequence[StreamTask], what: str, instead: str) -> None:
    """Raise PlanError for a task with captions; `what` needs classes, and `instead` is what other techniques need."""
    parts = [(task.name, part.dataset) for task in tasks for part in task.parts]
    for task, dataset in parts:
        if world.datasets[dataset].kind != "classification":
            raise PlanError(
                f"task {task}: {what}, and {dataset} has captions and no classes; choose a technique that needs {instead}, or take the "
                "task out of the stream"
            )
