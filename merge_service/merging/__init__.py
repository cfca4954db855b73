"""Checkpoints in, a checkpoint out: all experts at once, one into a running model, or as a stream that remembers.

Inputs are opened, recognised, made to fit each other and named before a block is computed; a report says what was done. The same
functions are in `merge_service.merge`, which is the documented place of them.
"""

from merge_service.merging.combine import advance, fold, merge, replace, retract
from merge_service.merging.intake import Rules
from merge_service.merging.jobs import MergeJob
from merge_service.merging.report import MergeReport
from merge_service.merging.stream import Member

__all__ = [
    "Member",
    "MergeJob",
    "MergeReport",
    "Rules",
    "advance",
    "fold",
    "merge",
    "replace",
    "retract",
]
