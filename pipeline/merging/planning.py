"""The plan of a merge of files, as `temporal-merge merge --plan` prints it.

Invariant: nothing is written. What a merge would refuse for its options or headers is refused here in the same words.
"""

import os
from dataclasses import replace
from pathlib import Path

from merge_service.checkpoints import bytes_of, written
from merge_service.engine import Execution as Running
from merge_service.errors import UserError
from merge_service.merging import Derivation, MergePlan, Operator, Out, Rules, Way, members_of, plan_merge
from merge_service.timelines import translate_merge
from pipeline.merging.compare import LARGE_BYTES
from pipeline.merging.files import Execution, FileMerge, checked, nearby


def plan_files(what: FileMerge, how: Execution = Execution(), compare: bool | None = False) -> MergePlan:
    """The plan of `merge_files`, and of the comparison after it as of `compared`. Raises what that raises."""
    with nearby(what, how) as near:
        return _planned(checked(near), how, compare)


def _planned(what: FileMerge, how: Execution, compare: bool | None) -> MergePlan:
    params = translate_merge(what.technique, what.params, what.parity, len(what.experts))
    operator = Operator.of(what.technique, params, "merge")
    members = members_of(what.experts, what.ids, None, None)
    out = Out(
        Path(what.out),
        bytes_of(how.shard_size) if how.shard_size else None,
        dtype=written(what.dtype) if what.dtype else None,
    )
    threads = how.threads or (1 if how.workers > 1 else len(os.sched_getaffinity(0)))
    way = Way(Running(threads, device=how.device), Rules(what.any_base, what.strip_prefix))
    plan = plan_merge(Derivation(operator, what.base, members), out, way, how.workers)
    if what.base is None or compare is False or (compare is None and plan.inputs > LARGE_BYTES):
        return plan
    more = 2 * (plan.inputs + plan.written) / 1e9
    said = f"then the task vectors are compared, which reads {more:,.1f} GB more; --no-compare leaves it out"
    return replace(plan, notes=(*plan.notes, said))


def check_room(plan: MergePlan) -> None:
    """Raise UserError unless the result has room where it is written, as the merge would."""
    if not plan.fits:
        raise UserError(
            f"the result needs {plan.disk / 1e9:,.1f} GB at {plan.place}, and {plan.free / 1e9:,.1f} GB are free; make room, or give "
            "another --out"
        )
