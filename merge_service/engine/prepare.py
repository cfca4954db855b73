"""Statistics over whole tensors (thresholds, norms, angles) that must be known before merging starts.

They are computed by questions whose answers add up over parts of a model, so one process or many can answer. A technique's
thinning and its rule determine which statistics it needs.

Invariant: no block is written here, and every statistic is exact.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_service.anatomy.protocol import Anatomy
from merge_service.blocks.questions import NOTHING, Ask, Findings
from merge_service.engine.task import MergeTask


@dataclass(frozen=True)
class Few:
    """Some of a task's tensors as `techniques.place.View`, for what can be prepared of these alone (`MergeTask.in_turn`)."""

    task: MergeTask
    merged: Sequence[tuple[str, int]]

    @property
    def params(self) -> Mapping[str, Any]:
        """As of the task, like the others that follow."""
        return self.task.params

    @property
    def orders(self) -> Sequence[int]:
        return self.task.orders

    @property
    def wide(self) -> bool:
        return self.task.wide

    @property
    def anatomy(self) -> Anatomy:
        return self.task.anatomy

    @property
    def combined(self) -> Sequence[tuple[str, int]]:
        return [tensor for tensor in self.merged if tensor[0] not in self.task.statistics]

    @property
    def group_sizes(self) -> Mapping[str, int]:
        return {
            group: self.task.group_sizes[group] for group in (self.task.group(n) for n, _ in self.combined)
        }


def prepare(task: MergeTask, ask: Ask, found: Findings = NOTHING, few: Few | None = None) -> Findings:
    """Everything that the blocks of a task, or of a few of its tensors, depend on besides it. Thresholds that are in `found` already are
    not looked for."""
    _ = task.factors  # refuses names that say no depth, before anything is looked at
    view = few or task
    return task.rule.prepare(ask, view, task.thin.prepare(ask, view, found))
