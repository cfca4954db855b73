"""The report of a merge: what was done, how tensor names were read, and what the user should know about the result.

Invariant: nothing here affects a byte of the result.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merge_service.anatomy.structure import some
from merge_service.blocks.moments import Geometry
from merge_service.checkpoints.target import Target
from merge_service.checkpoints.writer import Writer
from merge_service.engine.task import MergeTask
from merge_service.merging.derivation import Lineage


@dataclass(frozen=True)
class MergeReport:
    """What a merge did. `merged_norm` is the L2 norm of merged - base over float tensors, None without a base; `geometry` has it and the
    newest expert's, where `Execution.newest` asked for these. `sha256` is that of the files by name, where `Out.hashed` did, `state` the checksum of the
    streaming state that was written.

    `inputs` are the experts by id, file and sha256 if the merge had to determine these. `notes` are for the user: what is unusual
    about the inputs and how they were read, thresholds that could not be kept, statistics that should be estimated again, tensors
    that were found tied, matrices that stayed packed. `stacks` has the depth of every stack of blocks by tower, for techniques
    that depend on towers or depth.
    """

    out: Path | None
    technique: str
    params: dict[str, Any]
    experts: int
    parameters: int
    seconds: float
    merged_norm: float | None
    geometry: Geometry | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)
    state: str | None = None
    notes: tuple[str, ...] = ()
    inputs: tuple[dict[str, str], ...] = ()
    stacks: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Done:
    """What carrying a merge out has found: where the result lies, the writer of its files, notes, the checksum of a state."""

    geometry: Geometry | None
    writer: Writer | None
    notes: tuple[str, ...]
    state: str | None = None

    @property
    def sha256(self) -> dict[str, str]:
        """Of the files that were hashed while they were written, by name."""
        files = self.writer.files if self.writer else ()
        return {file.path.name: file.digest_found for file in files if file.digest_found}


def report_of(
    task: MergeTask,
    target: Target | None,
    known: Lineage,
    began: float,
    done: "Done",
) -> MergeReport:
    """The report of a merge that began at `began` (`time.perf_counter`)."""
    asks = task.technique.scale.by_name or task.params.get("granularity") == "tower"
    return MergeReport(
        out=target.place(task.reference) if target else None,
        technique=task.technique.name,
        params=dict(task.params),
        experts=len(known.inputs),
        parameters=sum(numel for _, numel in task.merged),
        seconds=time.perf_counter() - began,
        merged_norm=done.geometry.merged_norm if done.geometry else None,
        geometry=done.geometry,
        sha256=done.sha256,
        state=done.state,
        notes=(*known.notes, *done.notes, *(target.notes if target else ()), *_remarks(task)),
        inputs=tuple(known.inputs) if known.about else (),
        stacks={tower: dict(stacks) for tower, stacks in task.anatomy.stacks.items()} if asks else {},
    )


def _remarks(task: MergeTask) -> Iterator[str]:
    lacking = [name for name, _ in task.combined if _lacks(task, name)]
    if lacking:
        yield f"without statistics of every expert, {len(lacking)} tensors are averaged or left out of what was measured: {some(lacking)}"
    learned = task.inputs[0].evidence if task.inputs and task.technique.learned else None
    if learned is not None and not learned.about.experts:
        yield f"{learned.path} does not say for which experts it was learned, so that was not checked"
    if learned is not None and learned.about.parameters.get("adapted_on") == "test":
        yield f"{learned.path} was adapted on test images: scores of this model on them are those of test-time adaptation"
    measured = [] if learned is not None else task.inputs
    unknown = [one.id for one in measured if one.evidence and one.evidence.about.expert_sha256 is None]
    if unknown:
        yield f"statistics of {some(unknown)} do not say of which weights they are, so that was not checked"
    if task.tied and task.inputs:
        pairs = [f"{alias} is {name}" for alias, name in task.tied.items()]
        yield f"tied tensors are merged as one: {some(pairs)}"
    statistics = [name for name, _ in task.merged if task.anatomy.is_statistic(name)]
    if statistics:
        yield (
            f"BatchNorm statistics ({some(statistics)}) are the mean of the experts'; they do not belong to the merged weights: "
            "estimate them again on data of the tasks before the model is used"
        )
    yield from task.technique.scale.remarks(task)
    yield from task.packing.remarks if task.whole else ()


def _lacks(task: MergeTask, name: str) -> bool:
    """Whether a tensor is one that the rule uses statistics of, and some expert has none."""
    measured = [
        one.evidence for one in task.inputs if one.evidence is not None and not task.technique.learned
    ]
    rule: Any = task.rule
    wanted = measured and (not task.whole or rule.wants(task.facts(name)))
    return bool(wanted) and not all(one.holds_all(name) for one in measured)
