"""What a rule may know of each block: the task's parameters and the findings, for one expert and one span.

Invariant: a place does not depend on how tensors are cut, except for the start of its span.
"""

import numpy as np

from merge_service.anatomy.structure import modality
from merge_service.blocks.masks import tensor_key
from merge_service.blocks.questions import EVERYTHING, Findings
from merge_service.blocks.spans import Span
from merge_service.engine.task import Input, MergeTask
from merge_service.techniques.params import of_expert
from merge_service.techniques.place import Place
from merge_service.techniques.shares import is_weighed, share, weight_of


class Places:
    """The places of one merge, given its findings."""

    def __init__(self, task: MergeTask, found: Findings) -> None:
        self.task, self.found = task, found
        self._is_weighed, self._weights = is_weighed(task.params), dict[tuple[str, int], float]()

    def all(self, span: Span) -> dict[int, Place]:
        """The place of a span in every expert, by the expert's number."""
        return {expert.order: self.of(expert, span) for expert in self.task.inputs}

    def of(self, expert: Input, span: Span) -> Place:
        """The place of a span in one expert."""
        task, params, order, found = self.task, self.task.params, expert.order, self.found
        if span.name in task.statistics:
            weighs = task.technique.space == "weights" or "weight" in params or task.rule.weighs
            given = weighs and task.technique.origin is None
            return Place(order, share(params, order, span.name) if given else 1 / order)
        if task.technique.space == "weights" or (task.rule.weighs and self._is_weighed):
            return Place(order, share(params, order, span.name), found.turns.get((span.name, order)))
        group = task.group(span.name), order
        gain = None if params.get("rescale") == "expectation" else found.gains.get((span.name, order), 1.0)
        return Place(
            order,
            1 / order,
            thresholds=found.thresholds.get(group, EVERYTHING),
            scores=found.scores.get(group, EVERYTHING),
            key=self._mask_key(expert, span.name),
            density=of_expert(params.get("density", 1.0), order),
            epsilon=params.get("epsilon", 0.0),
            gain=gain,
            start=span.start,
            columns=task.columns(span.name),
            weight=self._weight(span.name, expert),
            evidence=self._evidence(expert, span) if task.rule.measured else None,
        )

    def _weight(self, name: str, expert: Input) -> float:
        order = expert.order
        if not self._is_weighed and not self.task.rule.learned:
            return 1.0
        if (name, order) not in self._weights:
            learned = self.task.rule.learned
            self._weights[name, order] = (
                self._learned(expert, name) if learned else weight_of(self.task.params, order, name)
            )
        return self._weights[name, order]

    def _evidence(self, expert: Input, span: Span) -> np.ndarray | None:
        if expert.evidence is None or not expert.evidence.holds(span.name):
            return None
        return expert.evidence.block(span.name, span.start, span.stop)

    def _mask_key(self, expert: Input, name: str) -> int | None:
        """The key of the random mask; None without randomness. Scalars are never dropped."""
        task = self.task
        scalar = task.reference.tensors[name].shape == () and not task.rule.masks_scalars
        if scalar or "seed" not in task.params:
            return None
        return tensor_key(task.params["seed"], expert.id, name)

    def _learned(self, expert: Input, name: str) -> float:
        """The learned coefficient of an expert in a tensor; where none was learned, the one that learning began with.

        Those of `*` were learned in the towers that learned alone.
        """
        found = expert.evidence
        if found is None:  # no merge: thresholds of a new expert, on which factors do not bear
            return 1.0
        if self.task.anatomy.is_scale(name) and not found.holds(name):
            return 0.0
        towers = found.about.parameters.get("learning", {}).get("towers", "both")
        other = towers != "both" and modality(name) != towers and not found.holds(name)
        factors = None if other else found.factors(name)
        if factors is None:
            return float(of_expert(found.about.parameters.get("start", 0.0), expert.order))
        return float(factors[expert.order - 1])
