"""Which merges of a plan keep their weights as files, and how much disk that takes.

A merge that is not kept is a recipe from the moment on at which no step of the plan waits for its weights (`store.recipes`).
Invariant: pure; what is kept bears on no result, no fingerprint and no other study.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from pipeline.kinds.specs import EvaluateSpec, MergeSpec
from pipeline.plan.steps import Plan
from pipeline.store.recipes import not_portable

Policy = Literal["all", "final", "best", "none"]
AT_ONCE = 4
"""Merges that only wait to be scored may pile up to so many; then no further one is begun before one of them is scored."""


class Keep(Protocol):
    """What a study says of its merges: `keep`, and after how many folds one stays so that later ones are made from it."""

    @property
    def keep(self) -> Policy: ...
    @property
    def anchors(self) -> int: ...


@dataclass(frozen=True)
class Disk:
    """Bytes of the steps that are ahead: what stays, the most there will be at a time, and what all of them would take."""

    kept: int
    peak: int
    all: int


def kept_merges(plan: Plan, how: Keep) -> frozenset[str]:
    """The merges whose weights stay as files while the study runs.

    `best` keeps what `final` does until it is known which trajectory is best. Techniques whose bits depend on a library, and those of
    one's own, always stay.
    """
    merges = {fp: step for fp, step in plan.steps.items() if step.kind == MergeSpec.kind}
    if how.keep == "all":
        return frozenset(merges)
    stay = {fp for fp, step in merges.items() if not_portable(step) is not None}
    if how.keep == "none":
        return frozenset(stay)
    last = {one.points[-1].merge for one in plan.trajectories}
    folds = {
        fp
        for fp, step in merges.items()
        if how.anchors and step.spec["form"] == "fold" and step.t % how.anchors == 0
    }
    return frozenset(stay | folds | {fp for fp in merges if fp in last})


def waiting_for(plan: Plan) -> dict[str, set[str]]:
    """For every merge the steps that read its weights."""
    readers: dict[str, set[str]] = {
        fp: set() for fp, step in plan.steps.items() if step.kind == MergeSpec.kind
    }
    for fp, step in plan.steps.items():
        for source in step.inputs.values():
            if source in readers:
                readers[source].add(fp)
    return readers


def only_scored(plan: Plan, readers: Mapping[str, Collection[str]]) -> frozenset[str]:
    """Merges that no other merge and no training starts from."""
    return frozenset(
        fp for fp, steps in readers.items() if all(plan.steps[one].kind == EvaluateSpec.kind for one in steps)
    )


def disk(plan: Plan, ahead: Collection[str], kept: Collection[str]) -> Disk:
    """What the steps `ahead` take. `peak` is an upper bound: beside what stays, the newest two merges of every series that others
    start from, and `AT_ONCE` of those that are only scored."""
    size = {fp: plan.steps[fp].disk_bytes for fp in ahead}
    passing = {fp for fp in ahead if plan.steps[fp].kind == MergeSpec.kind and fp not in kept}
    total = sum(size.values())
    stays = total - sum(size[fp] for fp in passing)
    readers = waiting_for(plan)
    scored = passing & only_scored(plan, readers)
    at_once = sum(sorted((size[fp] for fp in scored), reverse=True)[:AT_ONCE])
    chained = passing - scored
    at_once += min(2 * sum(size[fp] for fp in _ends(plan, chained)), sum(size[fp] for fp in chained))
    return Disk(stays, stays + at_once, total)


def _ends(plan: Plan, merges: Collection[str]) -> set[str]:
    """The last merge of every series: those that no other merge follows."""
    followed = {one for fp in merges for one in (*plan.steps[fp].after, *plan.steps[fp].inputs.values())}
    return {fp for fp in merges if fp not in followed}
