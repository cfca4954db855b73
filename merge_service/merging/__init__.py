"""Checkpoints in, a checkpoint out: all experts at once, one into a running model, or as a stream that remembers.

How a merged model is made is a `Derivation`: operator, base and members. Inputs are opened, recognised, made to fit each other and
named before a block is computed; a report says what was done. `merge_service.merge` holds the functions that people call.
"""

from merge_service.merging.derivation import Member, Rules
from merge_service.merging.jobs import MergeJob
from merge_service.merging.report import MergeReport

__all__ = [
    "Member",
    "MergeJob",
    "MergeReport",
    "Rules",
]
