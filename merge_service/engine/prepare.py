"""Statistics over whole tensors (thresholds, norms, angles) that must be known before a block can be made.

All of it is asked for with questions whose answers add up over parts of a model, so that one process or many can answer. What a
technique needs, its ways of thinning out and of combining say themselves.

Invariant: nothing here touches a block, and what is found is exact.
"""

from merge_service.blocks.questions import NOTHING, Ask, Findings
from merge_service.engine.task import MergeTask


def prepare(task: MergeTask, ask: Ask, found: Findings = NOTHING) -> Findings:
    """Everything that the blocks of a task depend on besides it. Thresholds that are in `found` already are not looked for."""
    if task.technique.depth and task.merged:
        _ = task.factors  # refuses names that say no depth, before anything is looked at
    return task.rule.prepare(ask, task, task.thin.prepare(ask, task, found))
