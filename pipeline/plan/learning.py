"""The learn steps of one cell: one for every merge with learned coefficients, planned before it and shared like any other step.

Invariant: learning reads training splits alone: of the tasks so far, which a strategy without replay may not (`grid.forbidden_data`), or
of the new task alone, from which a fold can learn.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_service import timelines as timeline
from merge_service.timelines import Merged
from pipeline.errors import PlanError
from pipeline.kinds.specs import LearnSpec, Spec
from pipeline.kinds.table import KINDS
from pipeline.plan.measuring import Measured, classes_of, refuse_captions, rows_of, sample_cost
from pipeline.plan.steps import RECORD_BYTES, About, World
from pipeline.study.sections import LearningSection
from pipeline.study.streams import StreamTask
from workers.learning.wanted import METHODS, Wanted

FORWARD = 1 / 3
"""The cost of a forward pass in passes forward and backward."""
PASSES = {"entropy": 1.0, "labels": 1.0, "experts": 1.0, "heads": 1.0, "triggers": 3 + FORWARD}
"""What a method does with an image at a step: with triggers an attack, which needs the clean answer, the clean and the triggered loss."""
BYTES = {"concrete": 1.0, "dam": 0.05}
"""The size of a file in sizes of the checkpoint (dam: for every expert), at most."""
FACTORS = 0.01
"""The same of methods with a factor per expert and tensor."""


@dataclass(frozen=True)
class Learning:
    """How the merges of a cell are learned: the section of the study, and on which device with how many threads."""

    how: LearningSection
    engine: Mapping[str, Any]


def wanted_of(merge: timeline.Merge, how: LearningSection) -> Wanted:
    """What is to be learned for a merge: what the study states, and the parameters of the merge that bear on learning.

    Raises PlanError for a fold where there is none to learn, and for parameters of the merge that learning does not know.
    """
    technique, params = merge.technique, merge.params
    method, given = how.method(technique), how.given(technique)
    row = METHODS[method]
    if merge.result.form == "fold":
        if "fold" not in row.takes:
            able = ", ".join(name for name, one in METHODS.items() if "fold" in one.takes)
            raise PlanError(
                f"{technique}: there is no way to learn a fold for it, only for {able}; use init and deploy: all, or {able}"
            )
        given["fold"] = True
    if row.technique == "concrete":
        given |= {"start": params["scale"], "temperature": params["temperature"]}
    if params.get("trim"):
        if params["granularity"] != "model":
            raise PlanError(
                f"{technique}: learning trims over the whole model, and granularity is {params['granularity']}; leave it out"
            )
        given |= {"trim": True, "density": params["density"]}
    return Wanted.of(method, given)


class Learner:
    """Adds the learn steps of one cell. `used` are these, with their GFLOPs."""

    def __init__(self, add: Callable[[Spec, About], str], world: World, learning: Learning) -> None:
        self._add, self._world, self._learning = add, world, learning
        self._made: dict[Merged, str] = {}
        self.used: dict[str, float | None] = {}

    def of(self, merge: timeline.Merge, tasks: Sequence[StreamTask], what: Measured) -> str:
        """The step that learns the coefficients of a merge of models from data of tasks."""
        result, how, world = merge.result, self._learning.how, self._world
        wanted = wanted_of(merge, how)
        refuse_captions(world, tasks, f"{merge.technique} learns from class scores", "gram or no data")
        warm = how.warm_start and result.form == "merge"  # a fold has no model of the fold before it
        spec = LearnSpec(
            version=KINDS[LearnSpec.kind].revision,
            method=wanted.method,
            params={key: value for key, value in wanted.said().items() if key != "device"},
            base=world.base.fingerprint,
            models=[*what.models],
            data=[*what.data],
            before=self._made.get(Merged(result.policy, result.t - 1), "") if warm else "",
            engine=self._learning.engine,
        )
        many = len(what.models) if wanted.row.technique != "concrete" else 1
        size = BYTES.get(wanted.row.technique, FACTORS) * world.facts.weights_bytes * many
        about = About(
            f"t{result.t}-learn_{result.policy}-{wanted.method}",
            f"t{result.t} {tasks[-1].name}: {wanted.method} ({result.policy}) learned on {len(tasks)} task{'s' * (len(tasks) > 1)}",
            result.t,
            tasks[-1].name,
            gflops=self._cost(wanted, tasks),
            disk_bytes=int(size) + RECORD_BYTES,
            base=world.base.fingerprint,
            model=world.model,
        )
        fingerprint = self._made[result] = self._add(spec, about)
        self.used[fingerprint] = about.gflops
        return fingerprint

    def _cost(self, wanted: Wanted, tasks: Sequence[StreamTask]) -> float | None:
        """GFLOPs of all passes; None if the cost of a sample was not measured. Class prompts count where the text tower learns."""
        sample, found = sample_cost(self._world), 0.0
        if sample is None:
            return None
        for task in tasks:
            rows = rows_of(self._world, task, wanted.examples)
            prompts = classes_of(self._world, task) if wanted.towers == "both" else 0
            found += wanted.steps * PASSES[wanted.row.loss] * (min(wanted.batch_size, rows) + prompts)
            found += FORWARD * rows if wanted.row.each else 0  # the experts' own predictions
        return sample * found
