"""One merge in several processes, each of which reads and writes only its own tensors.

A part is a run of tensors that lie together in the output, and parts are of about equal size. The coordinator asks all of
them what must be known of whole groups before blocks can be made (`Surveyor`'s questions, whose answers add up), then has
them write into one preallocated file, then settles votes between them. It moves counts and a few numbers per tensor, never
weights. How parts are called is left open: as objects here, or as actors on other machines.

Invariant: what is written does not depend on the number of parts, bit for bit, and every byte is accounted for before the
file appears under its name. All parts see the same files: contents are compared, so that a path that means something else on
another machine is an error and not a wrong model.
"""

import contextlib
import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from merge_service.blocks.questions import Answer, Findings, Question, together
from merge_service.checkpoints.checkpoint import Checkpoint
from merge_service.checkpoints.header import TensorInfo
from merge_service.checkpoints.ties import Ties
from merge_service.checkpoints.writer import CheckpointWriter, Slot, SlotWriter, Written
from merge_service.engine.assembly import Assembly, Balance, Execution, copy
from merge_service.engine.compute import Compute, site_of
from merge_service.engine.stream_state import Ends
from merge_service.engine.survey import Surveyor
from merge_service.engine.task import Input, MergeTask
from merge_service.errors import CheckpointError
from merge_service.faults import point
from merge_service.techniques.definition import Origin
from merge_service.techniques.own import load
from merge_service.techniques.registry import get

Call = Callable[..., list[Any]]
"""`call(method, *arguments)` of every part's `PartWorker` at the same time; the answers, in the order of the parts."""
Hire = Callable[[Sequence["Part"]], contextlib.AbstractContextManager[Call]]
"""Makes a `PartWorker` for each of these parts, somewhere, for the length of a `with` block."""


@dataclass(frozen=True)
class Source:
    """A checkpoint by absolute path, the fingerprint that tells whether another machine sees the same one, and how its names are
    read otherwise (`renames` and `lent` of `Checkpoint`)."""

    path: Path
    fingerprint: str
    renames: tuple[tuple[str, str], ...] = ()
    lent: Mapping[str, TensorInfo] = field(default_factory=dict)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Source":
        renames, lent = tuple(checkpoint.renames), dict(checkpoint.lent)
        return cls(checkpoint.path.absolute(), checkpoint.fingerprint(), renames, lent)

    def open(self) -> Checkpoint:
        """Raises `CheckpointError` naming this machine and the path unless the same file is here."""
        try:
            checkpoint = Checkpoint.open(self.path)
        except CheckpointError as error:
            raise _not_shared(str(error)) from None
        if checkpoint.fingerprint() != self.fingerprint:
            checkpoint.close()
            raise _not_shared(f"{self.path} is another file than where the merge was started")
        for old, new in self.renames:
            checkpoint.rename(old, new)
        for name, info in self.lent.items():
            checkpoint.lend(name, info)
        return checkpoint


@dataclass(frozen=True)
class Part:
    """What one process has to know of a merge: `params` are resolved, `tensors` names its share of those that are merged."""

    technique: str
    params: Mapping[str, Any]
    base: Source | None
    experts: tuple[tuple[str, Source], ...]
    tensors: tuple[str, ...]
    ties: Ties
    execution: Execution
    origin: Origin | None


@dataclass(frozen=True)
class Share:
    """What a part has done: partial sums of (merged - base)^2, and what it wrote."""

    squares: list[float]
    written: Written


@dataclass(frozen=True)
class Split:
    """That a merge is to be made in (at most) so many parts, and by whom."""

    parts: int
    hire: Hire

    @contextlib.contextmanager
    def team(self, task: MergeTask, execution: Execution) -> Iterator["Team"]:
        """Workers that have opened everything `task` is made of."""
        base = Source.of(task.base) if task.base else None
        experts = tuple((expert.id, Source.of(expert.weights)) for expert in task.inputs)
        name, params, origin = task.technique.name, dict(task.params), task.technique.origin
        parts = [
            Part(name, params, base, experts, tensors, task.tied, execution, origin)
            for tensors in cut(task, self.parts)
        ]
        with self.hire(parts) as call:
            call("open")
            yield Team(call)


class Team:
    """The workers of all parts of a merge, as its coordinator sees them."""

    def __init__(self, call: Call) -> None:
        self.call = call

    def answer(self, question: Question) -> Answer:
        """The answer for all tensors."""
        return together(self.call("answer", question))

    def assemble(
        self, task: MergeTask, found: Findings, writer: CheckpointWriter, execution: Execution
    ) -> float | None:
        """As `assembly.assemble`, by the workers."""
        copy(task, writer)
        balances: list[Balance] = self.call("write", found, writer.slot())
        total = {group: sum(votes.get(group, 0) for votes in balances) for group in task.group_sizes}
        shares: list[Share] = self.call("settle", total)
        for share in shares:
            writer.account(share.written)
        squares = math.fsum(x for share in shares for x in share.squares)
        return math.sqrt(squares) if execution.measures(task) else None


class PartWorker:
    """Does one part. A plain class, which is an actor's as well; it opens files on demand, so that errors have a caller."""

    def __init__(self, part: Part) -> None:
        self.part = part

    def open(self) -> None:
        """Open all checkpoints. Raises `CheckpointError` naming this machine when they are not (the same) here."""
        part = self.part
        if part.origin is not None:
            load(part.technique, part.origin)
        base = part.base.open() if part.base else None
        inputs = [Input(name, order, source.open()) for order, (name, source) in enumerate(part.experts, 1)]
        self.task = MergeTask.of(get(part.technique), part.params, base, inputs, part.ties)
        self.site = site_of(part.execution.device)
        mine = set(part.tensors)
        self.tensors = [(name, numel) for name, numel in self.task.merged if name in mine]

    def answer(self, question: Question) -> Answer:
        """What is known of this part's tensors."""
        return self._surveyor.answer(question)

    def write(self, found: Findings, slot: Slot) -> Balance:
        """Make and store this part's blocks, with the numbers that were found for all."""
        try:
            self.writer = SlotWriter(slot)
        except CheckpointError as error:
            raise _not_shared(str(error)) from None
        compute = Compute(self.task, found, self.site)
        self.assembly = Assembly(compute, self.tensors, Ends(self.writer), self.part.execution)
        balance = self.assembly.write()
        point("merge.part")
        return balance

    def settle(self, balance: Balance) -> Share:
        """Mend what the votes of all groups decide, sync, and say what was done."""
        squares = self.assembly.settle(balance)
        self.writer.close()
        return Share(squares, self.writer.written)

    @cached_property
    def _surveyor(self) -> Surveyor:
        combined = {name for name, _ in self.task.combined}
        mine = [tensor for tensor in self.tensors if tensor[0] in combined]
        return Surveyor(self.task, mine, self.part.execution.threads)


def cut(task: MergeTask, parts: int) -> list[tuple[str, ...]]:
    """The names of merged tensors in at most `parts` runs of about equal bytes, in the order of the output's data.

    A tensor is in the part in which its middle falls; parts that get none are left out (but one always remains).
    """
    if parts < 1:
        raise ValueError(f"a merge has at least 1 part, not {parts}")
    infos = task.reference.tensors
    names = sorted((name for name, _ in task.merged), key=lambda name: -infos[name].kind.itemsize)
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
