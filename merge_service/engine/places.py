"""What a rule may know of each block: the task's parameters and the findings, put together for one expert and one span.

Invariant: a place does not depend on how tensors are cut, but for where its span begins.
"""

from merge_service.blocks.masks import tensor_key
from merge_service.blocks.questions import EVERYTHING, Findings
from merge_service.blocks.spans import Span
from merge_service.engine.task import Input, MergeTask
from merge_service.techniques.place import Place
from merge_service.techniques.shares import share


class Places:
    """The places of one merge, as far as `found` is known."""

    def __init__(self, task: MergeTask, found: Findings) -> None:
        self.task, self.found = task, found

    def all(self, span: Span) -> dict[int, Place]:
        """The place of a span in every expert, by the expert's number."""
        return {expert.order: self.of(expert, span) for expert in self.task.inputs}

    def of(self, expert: Input, span: Span) -> Place:
        """The place of a span in one expert."""
        task, params, order, found = self.task, self.task.params, expert.order, self.found
        if span.name in task.statistics:
            given = task.technique.space == "weights" and task.technique.origin is None
            return Place(order, share(params, order) if given else 1 / order)
        if task.technique.space == "weights":
            return Place(order, share(params, order), found.turns.get((span.name, order)))
        group = task.group(span.name), order
        gain = None if params.get("rescale") == "expectation" else found.gains.get((span.name, order), 1.0)
        return Place(
            order,
            1 / order,
            limits=found.thresholds.get(group, EVERYTHING),
            scores=found.scores.get(group, EVERYTHING),
            key=self._mask_key(expert, span.name),
            density=params.get("density", 1.0),
            epsilon=params.get("epsilon", 0.0),
            gain=gain,
            start=span.start,
            columns=task.columns(span.name),
        )

    def _mask_key(self, expert: Input, name: str) -> int | None:
        """None where nothing is random: scalars are never dropped."""
        task = self.task
        scalar = task.reference.tensors[name].shape == () and not task.rule.masks_scalars
        if scalar or "seed" not in task.params:
            return None
        return tensor_key(task.params["seed"], expert.id, name)
