"""The statistics of a merge's members: found, opened, and checked to belong to the weights that they are used with.

Invariant: every fault is found before a block is computed, and no statistic of other weights is used.
"""

import contextlib
from collections.abc import Sequence

from merge_service.checkpoints.weights import Weights
from merge_service.errors import TechniqueError
from merge_service.merging.derivation import Member, Operator
from merge_service.statistics import COEFFICIENTS, Statistics, beside
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
    if asked.of == "learned":
        return _learned(stack, name, base, members, opened)
    return [
        stack.enter_context(_open(asked, name, member, (weights, base)))
        for member, weights in zip(members, opened)
    ]


def _open(asked: Evidence, technique: str, member: Member, of: tuple[Weights, Weights | None]) -> Statistics:
    """The statistics of a member: `of` are its weights and the base."""
    weights, base = of
    measured = base if asked.of == "base" else weights
    path = member.statistics or beside(member.path, asked.kind)
    if not path.is_file() or (member.statistics is None and not weights.files):
        if asked.of == "experts":
            raise TechniqueError(
                f"{technique} measures all experts together on images of every task; give these in Python: tm.merge({technique!r}, "
                "experts, ..., inputs=[{'images': ...}, ...])"
            )
        which = "of the base on the data of" if asked.of == "base" else "of"
        if not weights.files:
            raise TechniqueError(
                f"{technique} needs statistics of kind {asked.kind} {which} {member.path}; give their files: statistics=[...], one for each "
                f"expert, in their order; measure({asked.kind!r}, ..., out=FILE) writes one"
            )
        raise TechniqueError(
            f"{technique} needs statistics of kind {asked.kind} {which} {member.path}, and there is no file {path}; give it "
            f"(--statistics, once per expert, in the order of the experts), make it: `temporal-merge measure {asked.kind} "
            f"CHECKPOINT --study STUDY.yaml --task TASK --out {path}`, or, without data, choose wudi"
        )
    found = Statistics(path)
    try:
        about = found.about
        stated = asked.of == "expert" and about.expert_sha256 == member.sha256
        known = about.expert_sha256 is not None and measured is not None and not stated
        found.check(
            asked.kind, measured.digests() if known and measured is not None else None, str(member.path)
        )
        found.check_tensors({name: info.numel for name, info in weights.tensors.items()}, str(member.path))
    except BaseException:
        found.checkpoint.close()
        raise
    return found


def _learned(
    stack: contextlib.ExitStack,
    technique: str,
    base: Weights | None,
    members: Sequence[Member],
    opened: Sequence[Weights],
) -> Evidences:
    """The one file of coefficients of all members. Raises `TechniqueError` if there is none, or it is of others."""
    files = {member.statistics for member in members}
    if None in files or len(files) > 1:
        raise TechniqueError(
            f"{technique} merges with coefficients that were learned for these experts together; give the one file (--coefficients FILE), or "
            f"learn it: `temporal-merge learn {technique} EXPERT... --base BASE --study STUDY.yaml --tasks TASK,... --out FILE`"
        )
    found = [stack.enter_context(Statistics(file)) for file in files if file is not None]
    for one in found:
        _check_learned(one, technique, base, opened)
    return found * len(members)


def _check_learned(
    found: Statistics, technique: str, base: Weights | None, opened: Sequence[Weights]
) -> None:
    about, path = found.about, found.path
    if found.kind != COEFFICIENTS:
        raise TechniqueError(
            f"{path} holds statistics of kind {found.kind}, and {technique} needs coefficients"
        )
    if about.technique not in (None, technique):
        raise TechniqueError(f"{path} was learned for {about.technique}, not for {technique}")
    counts = {info.shape[0] for info in found.checkpoint.tensors.values() if info.shape}
    many = len(about.experts) or (counts.pop() if len(counts) == 1 else len(opened))
    if many != len(opened):
        raise TechniqueError(f"{path} was learned for {many} experts, and there are {len(opened)}")
    for number, (sha256, weights) in enumerate(zip(about.experts, opened), 1):
        if sha256 != weights.digests()[1]:
            raise TechniqueError(
                f"{path} was learned for other experts: number {number} is not {weights.path}; give the experts in their order there, or "
                f"learn again"
            )
    if base is not None and about.base_sha256 and about.base_sha256 != base.digests()[1]:
        raise TechniqueError(
            f"{path} was learned with another base than {base.path}; give that one, or learn again"
        )
