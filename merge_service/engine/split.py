"""One merge in several processes, each of which reads and writes only its own tensors.

A part is a run of tensors that are adjacent in the output; parts have about equal size. The coordinator asks all parts for
statistics of whole groups (`Surveyor`'s questions, whose answers add up), then has them write into one preallocated file, then
settles votes between them. It moves counts and a few numbers per tensor, never weights. `Call` leaves open how parts are called:
as objects in this process, or as actors on other machines.

Invariant: the output does not depend on the number of parts, bit for bit, and the file is published only when every byte is
accounted for. All parts see the same files: contents are compared, so a path that leads to another file on another machine is an
error and not a wrong model.
"""

import contextlib
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from merge_service.blocks.moments import Geometry, Moments
from merge_service.blocks.questions import Answer, Findings, Question, together
from merge_service.checkpoints.adapters.adapted import Adapted
from merge_service.checkpoints.adapters.opening import open_weights
from merge_service.checkpoints.checkpoint import Checkpoint
from merge_service.checkpoints.header import TensorInfo
from merge_service.checkpoints.ties import Ties
from merge_service.checkpoints.views.cast import Cast
from merge_service.checkpoints.views.view import View
from merge_service.checkpoints.weights import Weights
from merge_service.checkpoints.writer import Slot, SlotWriter, Writer, Written
from merge_service.engine.assembly import Balance, Execution, Made, Making, Votes, copy, in_file, make_some
from merge_service.engine.compute import Compute, site_of
from merge_service.engine.survey import Surveyor
from merge_service.engine.task import Input, MergeTask
from merge_service.errors import CheckpointError
from merge_service.faults import point
from merge_service.statistics import Statistics
from merge_service.techniques.definition import Origin
from merge_service.techniques.own import load
from merge_service.techniques.registry import get

Call = Callable[..., list[Any]]
"""`call(method, *arguments)` calls every part's `PartWorker` at the same time; the results are in the order of the parts."""
Hire = Callable[[Sequence["Part"]], contextlib.AbstractContextManager[Call]]
"""Creates a `PartWorker` for each of these parts for the length of a `with` block."""


@dataclass(frozen=True)
class Source:
    """A checkpoint by absolute path, the fingerprint by which other machines recognise it, and how its names are changed
    (`renames` and `lent` of `Checkpoint`); `wide`: its floats are float32 at least (`View.widened`).
    """

    path: Path
    fingerprint: str
    renames: tuple[tuple[str, str], ...] = ()
    lent: Mapping[str, TensorInfo] = field(default_factory=dict)
    wide: bool = False

    @classmethod
    def of(cls, checkpoint: Weights) -> "Source":
        """Raises `CheckpointError` for weights that no other process can open."""
        wide = isinstance(checkpoint, View) and checkpoint.is_widened
        if isinstance(checkpoint, View) and wide:
            checkpoint = checkpoint.of
        if not isinstance(checkpoint, Checkpoint | Adapted):
            raise CheckpointError(
                f"{checkpoint.path} is not a checkpoint on disk, so workers cannot read it; merge without --workers"
            )
        renames, lent = tuple(checkpoint.renames), dict(checkpoint.lent)
        path = checkpoint.source if isinstance(checkpoint, Adapted) else checkpoint.path.absolute()
        return cls(path, checkpoint.fingerprint(), renames, lent, wide)

    def open(self) -> Weights:
        """Raises `CheckpointError` naming this machine and the path unless the same file is here."""
        try:
            checkpoint = open_weights(self.path)
        except CheckpointError as error:
            raise _not_shared(str(error)) from None
        if checkpoint.fingerprint() != self.fingerprint:
            checkpoint.close()
            raise _not_shared(f"{self.path} is another file than where the merge was started")
        for old, new in self.renames:
            checkpoint.rename(old, new)
        for name, info in self.lent.items():
            checkpoint.lend(name, info)
        return View.widened(checkpoint) if self.wide else checkpoint


@dataclass(frozen=True)
class Part:
    """What one process needs to know of a merge: `params` are resolved, `tensors` names its share of the merged tensors, `number` says
    which of the parts it is."""

    number: int
    technique: str
    params: Mapping[str, Any]
    base: Source | None
    experts: tuple[tuple[str, Source], ...]
    tensors: tuple[str, ...]
    ties: Ties
    execution: Execution
    origin: Origin | None
    statistics: tuple[Path | None, ...] = ()


@dataclass(frozen=True)
class Share:
    """What a part has done: the moments of its blocks, and what it wrote."""

    moments: Moments
    written: Written


@dataclass(frozen=True)
class Split:
    """A merge in (at most) `parts` parts, by workers that `hire` creates."""

    parts: int
    hire: Hire

    @contextlib.contextmanager
    def team(self, task: MergeTask, execution: Execution) -> Iterator["Team"]:
        """Workers that have opened all inputs of `task`."""
        base = Source.of(task.base) if task.base else None
        experts = tuple((expert.id, Source.of(expert.weights)) for expert in task.inputs)
        name, params, origin = task.technique.name, dict(task.params), task.technique.origin
        measured = tuple(one.evidence.path.absolute() if one.evidence else None for one in task.inputs)
        parts = [
            Part(number, name, params, base, experts, tensors, task.tied, execution, origin, measured)
            for number, tensors in enumerate(cut(task, task.merged, self.parts))
        ]
        with self.hire(parts) as call:
            call("open")
            yield Team(call, len(parts))


@dataclass(frozen=True)
class Stint:
    """What the workers make together in one file: the names that each part computes, the file's open writer, and the dtype of floats in it
    if it is not that of the merge."""

    names: tuple[tuple[str, ...], ...]
    slot: Slot
    making: Making
    dtype: str | None = None


class Team:
    """The workers of all parts of a merge, for its coordinator."""

    def __init__(self, call: Call, parts: int) -> None:
        self.call, self._parts = call, parts

    def answer(self, question: Question) -> Answer:
        """The answer for all tensors."""
        return together(self.call("answer", question))

    def assemble(
        self, task: MergeTask, found: Findings, writer: Writer, execution: Execution
    ) -> Geometry | None:
        """As `assembly.assemble`, on the workers, into one file."""
        made = self.make(task, found, writer, Making())
        return Geometry.of(made.moments) if execution.measures(task) else None

    def make(self, task: MergeTask, found: Findings, writer: Writer, making: Making) -> Made:
        """As `assembly.make_some`, settled, on the workers."""
        (file,) = writer.files
        copy(task, writer, making)
        names = cut(task, in_file(task, making), self._parts)
        names += [()] * (self._parts - len(names))
        stint = Stint(tuple(names), file.slot(), making, writer.dtype if isinstance(writer, Cast) else None)
        votes = Votes.together(self.call("write", found, stint))
        decided, waiting = making.decided(task, votes)
        shares: list[Share] = self.call("settle", decided)
        for share in shares:
            file.account(share.written)
        return Made([row for share in shares for row in share.moments], votes, waiting)


class PartWorker:
    """Computes one part. A plain class that also serves as an actor; it opens files in a method, so that errors reach a caller."""

    def __init__(self, part: Part) -> None:
        self.part = part

    def open(self) -> None:
        """Open all checkpoints. Raises `CheckpointError` naming this machine if they are missing here or differ."""
        part = self.part
        if part.origin is not None:
            load(part.technique, part.origin)
        base = part.base.open() if part.base else None
        measured = part.statistics or (None,) * len(part.experts)
        inputs = [
            Input(name, order, source.open(), None if path is None else Statistics(path))
            for order, ((name, source), path) in enumerate(zip(part.experts, measured), 1)
        ]
        self.task = MergeTask.of(get(part.technique), part.params, base, inputs, part.ties)
        self.site = site_of(part.execution.device)
        mine = set(part.tensors)
        self.tensors = [(name, numel) for name, numel in self.task.merged if name in mine]

    def answer(self, question: Question) -> Answer:
        """The answer for this part's tensors."""
        return self._surveyor.answer(question)

    def write(self, found: Findings, stint: Stint) -> Votes:
        """Compute and store this part's blocks in a file, given the findings for all parts."""
        try:
            self.writer = SlotWriter(stint.slot)
        except CheckpointError as error:
            raise _not_shared(str(error)) from None
        infos, mine = self.task.reference.tensors, stint.names[self.part.number]
        out = self.writer if stint.dtype is None else Cast(self.writer, infos, stint.dtype)
        tensors = [(name, infos[name].numel) for name in mine]
        compute = Compute(self.task, found, self.site)
        self.some = make_some(compute, tensors, out, self.part.execution, stint.making)
        point("merge.part")
        return self.some.votes

    def settle(self, decided: Balance) -> Share:
        """Compute contested blocks again, given the votes of all groups; sync; return what was done."""
        moments = self.some.settle(decided)
        self.writer.close()
        return Share(moments, self.writer.written)

    @cached_property
    def _surveyor(self) -> Surveyor:
        combined = {name for name, _ in self.task.combined}
        mine = [tensor for tensor in self.tensors if tensor[0] in combined]
        return Surveyor(self.task, mine, self.part.execution.threads, self.site)


def cut(task: MergeTask, tensors: Sequence[tuple[str, int]], parts: int) -> list[tuple[str, ...]]:
    """The names of these tensors in at most `parts` runs of about equal bytes, in the order of the output's data.

    A tensor belongs to the part that holds its middle; empty parts are left out (but one always remains).
    """
    if parts < 1:
        raise ValueError(f"a merge has at least 1 part, not {parts}")
    infos = task.reference.tensors
    names = sorted((name for name, _ in tensors), key=lambda name: -infos[name].kind.itemsize)
    total, before = sum(infos[name].nbytes for name in names), 0
    runs: dict[int, list[str]] = {}
    for name in names:
        size = infos[name].nbytes
        middle = (2 * before + size) * parts // (2 * total) if total else 0
        runs.setdefault(min(middle, parts - 1), []).append(name)
        before += size
    return [tuple(run) for run in runs.values()] or [()]


def _not_shared(problem: str) -> CheckpointError:
    return CheckpointError(
        f"on {platform.node()}: {problem}. A merge on several machines needs its inputs and output under the same paths "
        "on all of them, on shared storage"
    )
