"""The statistics of a merge's members: found, opened, and checked to belong to the weights that they are used with.

Invariant: every fault is found before a block is computed, and no statistic of other weights is used.
"""

import contextlib
from collections.abc import Sequence

from merge_service.checkpoints.weights import Weights
from merge_service.errors import TechniqueError
from merge_service.merging.derivation import Member, Operator
from merge_service.statistics import Statistics, beside
from merge_service.techniques.definition import Evidence

Evidences = Sequence[Statistics | None]


def gather(
    stack: contextlib.ExitStack,
    operator: Operator,
    base: Weights | None,
    members: Sequence[Member],
    opened: Sequence[Weights],
) -> Evidences:
    """The statistics of every member, open as long as `stack`: the named file, or EXPERT.KIND.safetensors beside the expert.

    None for each where the operator needs none. Raises `TechniqueError` for statistics that are missing, not needed, or of other
    weights.
    """
    asked, name = operator.technique.asked(operator.params), operator.technique.name
    named = [member for member in members if member.statistics is not None]
    if asked is None and named:
        raise TechniqueError(
            f"{name} needs no statistics with these parameters; leave {named[0].statistics} out, or choose a technique that uses them"
        )
    if asked is None:
        return [None] * len(members)
    return [
        stack.enter_context(_open(asked, name, member, base if asked.of == "base" else weights))
        for member, weights in zip(members, opened)
    ]


def _open(asked: Evidence, technique: str, member: Member, measured: Weights | None) -> Statistics:
    path = member.statistics or beside(member.path, asked.kind)
    if not path.is_file():
        if asked.of == "experts":
            raise TechniqueError(
                f"{technique} measures all experts together on images of every task; give these in Python: tm.merge({technique!r}, "
                "experts, ..., inputs=[{'images': ...}, ...])"
            )
        which = "of the base on the data of" if asked.of == "base" else "of"
        raise TechniqueError(
            f"{technique} needs statistics of kind {asked.kind} {which} {member.path}, and there is no file {path}; give it "
            f"(--statistics FILE, once per expert, in the order of the experts), or make it: temporal-merge measure {asked.kind} "
            f"CHECKPOINT --study STUDY.yaml --task TASK --out {path}"
        )
    found = Statistics(path)
    try:
        about = found.about
        stated = asked.of == "expert" and about.expert_sha256 == member.sha256
        known = about.expert_sha256 is not None and measured is not None and not stated
        found.check(
            asked.kind, measured.digests() if known and measured is not None else None, str(member.path)
        )
    except BaseException:
        found.checkpoint.close()
        raise
    return found
