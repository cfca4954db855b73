"""Which merges of a plan keep their weights as files, and how much disk that takes.

A merge that is not kept is a recipe from the moment on at which no step of the plan waits for its weights (`store.recipes`).
Invariant: pure; what is kept bears on no result, no fingerprint and no other study.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from pipeline.kinds.specs import EvaluateSpec, MergeSpec, TrainSpec
from pipeline.plan.steps import Plan, Step
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
    """Bytes that the steps ahead take: what stays, what a run needs at least at a time, what it takes at most, and all merges kept.

    `scored` is the size of the largest merge that is only scored.
    """

    kept: int
    least: int
    peak: int
    all: int
    scored: int = 0

    def merges_at_once(self, free: int | None) -> int:
        """How many merges that are only scored fit at a time, when so many bytes are free; None means that there is no limit."""
        if free is None or not self.scored:
            return AT_ONCE
        return max(1, min(AT_ONCE, 1 + (free - self.least) // self.scored))


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


def disk(plan: Plan, ahead: Collection[str], kept: Collection[str], cache: int = 0) -> Disk:
    """What the steps `ahead` take. `peak` is an upper bound: beside what stays, the newest two merges of every series that others
    start from, `AT_ONCE` of those that are only scored, and the copies made where a merge is proven before it is dropped: one, or two
    if it is a fold. `least` has one of those that are only scored. Whole weights of adapters are made for the steps that read them: `least` has
    those of one step, `peak` what stays of all in `cache` bytes."""
    size = {fp: plan.steps[fp].disk_bytes for fp in ahead}
    passing = {fp for fp in ahead if plan.steps[fp].kind == MergeSpec.kind and fp not in kept}
    total = sum(size.values())
    stays = total - sum(size[fp] for fp in passing)
    scored = passing & only_scored(plan, waiting_for(plan))
    chained = passing - scored
    series = min(2 * sum(size[fp] for fp in _ends(plan, chained)), sum(size[fp] for fp in chained))
    proof = max((size[fp] * _copies(plan.steps[fp]) for fp in passing), default=0)
    largest = sorted((size[fp] for fp in scored), reverse=True)[:AT_ONCE]
    less = stays + series + proof
    once, every = _made(plan, ahead)
    most = max(once, min(cache, every))
    return Disk(
        stays,
        less + sum(largest[:1]) + once,
        less + sum(largest) + most,
        total + most,
        max(largest, default=0),
    )


def _made(plan: Plan, ahead: Collection[str]) -> tuple[int, int]:
    """Bytes of whole weights that are made of adapters: for one step at most, and for all experts that the steps ahead make or read."""
    adapters = {
        fp: plan.bases[step.base].disk_bytes
        for fp, step in plan.steps.items()
        if step.kind == TrainSpec.kind and step.spec["recipe"].get("adapter")
    }
    if not adapters:
        return 0, 0
    read = {fp: adapters.keys() & {fp, *plan.steps[fp].inputs.values()} for fp in ahead}
    every = frozenset().union(*read.values())
    return max((sum(adapters[one] for one in some) for some in read.values()), default=0), sum(
        adapters[one] for one in every
    )


def resume_bytes(plan: Plan, ahead: Collection[str], pace: Callable[[Step], tuple[int, float]]) -> int:
    """Bytes that one expert takes in scratch while it trains, at most: the checkpoint that it could go on from, and the next one.

    Each has the trained weights, both moments of AdamW and, if the recipe has it, the average over steps. `pace` gives (steps, seconds)
    between checkpoints. A partly trained model takes less.
    """
    trained = (plan.steps[fp] for fp in ahead if plan.steps[fp].kind == TrainSpec.kind)
    return max((_checkpoints(step, *pace(step)) * step.disk_bytes for step in trained), default=0)


def _checkpoints(expert: Step, every: int, seconds: float) -> int:
    """The most that the checkpoints of one expert hold at a time, in copies of its weights."""
    written = 2 if seconds else (expert.spec["steps"] - 1) // every if every else 0
    return min(2, written) * (4 if expert.spec["recipe"].get("ema") else 3)


def _copies(merge: Step) -> int:
    """How many files there are at most while a merge is made again: a fold is made from the fold before it."""
    return 2 if merge.spec["form"] == "fold" else 1


def _ends(plan: Plan, merges: Collection[str]) -> set[str]:
    """The last merge of every series: those that no other merge follows."""
    followed = {one for fp in merges for one in (*plan.steps[fp].after, *plan.steps[fp].inputs.values())}
    return {fp for fp in merges if fp not in followed}
