"""What a merge says of itself: what it did, what it took the names to mean, and what a person has to know of the result.

Invariant: nothing here bears on a byte of the result.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merge_service.checkpoints.target import Target
from merge_service.engine.task import MergeTask
from merge_service.merging.derivation import Lineage

_SHOWN = 3


@dataclass(frozen=True)
class MergeReport:
    """What a merge did. `merged_norm` is the L2 norm of merged - base over float tensors, None without a base.

    `inputs` are the experts by id, file and sha256 where the merge had to find these out. `notes` say what a person should know: what
    is unusual about the inputs and how they were read, thresholds that could not be kept, statistics that want re-estimation, tensors that
    were found tied, matrices that stayed fused. `stacks` has the depth of every stack of blocks by tower, where a technique asks for
    towers or depth.
    """

    out: Path | None
    technique: str
    params: dict[str, Any]
    experts: int
    parameters: int
    seconds: float
    merged_norm: float | None
    notes: tuple[str, ...] = ()
    inputs: tuple[dict[str, str], ...] = ()
    stacks: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


def report_of(
    task: MergeTask,
    target: Target | None,
    known: Lineage,
    began: float,
    norm: float | None,
    notes: tuple[str, ...],
) -> MergeReport:
    """The report of a merge that began at `began` (`time.perf_counter`); `notes` are those that it made on its way."""
    asks = task.technique.depth or task.params.get("granularity") == "tower"
    return MergeReport(
        out=target.place(task.reference) if target else None,
        technique=task.technique.name,
        params=dict(task.params),
        experts=len(known.inputs),
        parameters=sum(numel for _, numel in task.merged),
        seconds=time.perf_counter() - began,
        merged_norm=norm,
        notes=(*known.notes, *notes, *_remarks(task)),
        inputs=tuple(known.inputs) if known.about else (),
        stacks={tower: dict(stacks) for tower, stacks in task.anatomy.stacks.items()} if asks else {},
    )


def _remarks(task: MergeTask) -> Iterator[str]:
    if task.tied and task.inputs:
        pairs = [f"{alias} is {name}" for alias, name in task.tied.items()]
        yield f"tied tensors are merged as one: {_some(pairs)}"
    statistics = [name for name, _ in task.merged if name.endswith(("running_mean", "running_var"))]
    if statistics:
        yield (
            f"BatchNorm statistics ({_some(statistics)}) are the mean of the experts'; they do not belong to the merged weights: "
            "estimate them again on data of the tasks before the model is used"
        )
    if task.technique.depth and task.anatomy.sequences:
        lists = [f"{name} ({count})" for name, count in task.anatomy.sequences.items()]
        yield f"numbered lists that are no stack of blocks have lines_alpha: {_some(lists)}"
    if task.technique.depth:
        bare = [tower for tower, stacks in task.anatomy.stacks.items() if not stacks]
        if bare:
            yield f"no numbered blocks in the {' and '.join(bare)} tower: everything there has lines_alpha"
    yield from task.packing.remarks if task.whole else ()


def _some(words: Sequence[str]) -> str:
    more = len(words) - _SHOWN
    return ", ".join(words[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
