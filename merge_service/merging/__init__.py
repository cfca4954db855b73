"""Merging checkpoints: all experts at once, one into a running model, or as a stream with a state.

A `Derivation` (operator, base and members) says how a merged model is made. Inputs are opened, recognised, adapted to each other
and named before a block is computed; a report says what was done. `merge_service.merge` holds the public functions.
"""

from merge_service.merging.adapters.concatenate import concatenate
from merge_service.merging.adapters.extract import extract
from merge_service.merging.adapters.knots import merge_in_shared_basis
from merge_service.merging.adapters.written import Factors, Written
from merge_service.merging.adapters.written import write as write_adapter
from merge_service.merging.combine import merge_in_memory
from merge_service.merging.derivation import Derivation, Member, Operator, Out, Rules, Way, members_of
from merge_service.merging.jobs import MergedAs, MergeJob, TakeJob
from merge_service.merging.parts import Group, Seen, combine_groups
from merge_service.merging.plans.plan import MergePlan, plan_groups, plan_merge
from merge_service.merging.report import MergeReport
from merge_service.merging.streaming import merge_all
from merge_service.merging.taking import check_expert, copy_beside, said_of
from merge_service.merging.vector import WIDTH, TaskVector, task_vector, unit

__all__ = [
    "WIDTH",
    "Derivation",
    "Factors",
    "Group",
    "Member",
    "MergeJob",
    "MergePlan",
    "MergeReport",
    "MergedAs",
    "Operator",
    "Out",
    "Rules",
    "Seen",
    "TakeJob",
    "TaskVector",
    "Way",
    "Written",
    "check_expert",
    "combine_groups",
    "concatenate",
    "copy_beside",
    "extract",
    "members_of",
    "merge_all",
    "merge_in_memory",
    "merge_in_shared_basis",
    "plan_groups",
    "plan_merge",
    "said_of",
    "task_vector",
    "unit",
    "write_adapter",
]
