"""Computes and stores every block of a merge.

Each block is read, merged, rounded and written before the next one, on any number of threads. One statistic is not known block by
block: the majority sign, which decides votes that cancel exactly. Blocks with such votes are computed again.

Invariant: the bytes written do not depend on the size or order of blocks, or on threads.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from merge_service.blocks.device import Host
from merge_service.blocks.moments import Geometry, Moments, moments
from merge_service.blocks.questions import Findings
from merge_service.blocks.spans import BLOCK, Span, run, spans
from merge_service.checkpoints.buffers import buffers
from merge_service.checkpoints.dtypes import decode, encode, stored_finite
from merge_service.checkpoints.writer import CheckpointWriter, Writer
from merge_service.engine.compute import Compute
from merge_service.engine.prepare import Few, prepare
from merge_service.engine.stream_state import Ends
from merge_service.engine.survey import Surveyor
from merge_service.engine.task import MergeTask
from merge_service.engine.whole import assemble_tensors
from merge_service.errors import NonFiniteCheckpoint
from merge_service.techniques.place import Election, State

TURN = 1 << 22
"""Elements that are surveyed and made before the next are looked at, at least."""


@dataclass(frozen=True)
class Execution:
    """Execution options; they never affect the result. `block`: elements per span (default: the site's). `measure`: whether the norm of
    the merged task vector is computed; `newest`: whether the newest expert's norm is as well, and the cosine between the two."""

    threads: int = 1
    block: int | None = None
    measure: bool = True
    device: str | None = None
    newest: bool = False

    def measures(self, task: MergeTask) -> bool:
        """Whether anything is requested that needs a base, and there is one."""
        return self.measure and task.base is not None


Balance = dict[str, int]
"""Per group of tensors: elements that elected plus, minus those that elected minus."""


@dataclass(frozen=True)
class Votes:
    """How the groups voted in some tensors, and those of which an element's sum cancelled exactly."""

    balance: Balance
    contested: frozenset[str]

    @classmethod
    def together(cls, parts: Sequence["Votes"]) -> "Votes":
        """Of all parts."""
        groups = {group for one in parts for group in one.balance}
        balance = {group: sum(one.balance.get(group, 0) for one in parts) for group in groups}
        return cls(balance, frozenset().union(*(one.contested for one in parts)))


class Assembly:
    """Computes some tensors of a task. Others may be computed elsewhere; only `Balance`s have to be added up between.

    The sign of an element whose vote cancels exactly is known only when its group has been counted. `write` assumes plus, and
    `settle` computes the blocks again that hold such elements if it is not.
    """

    def __init__(
        self, compute: Compute, tensors: Sequence[tuple[str, int]], ends: Ends, execution: Execution
    ) -> None:
        self.compute, self.task, self.ends, self.threads = compute, compute.task, ends, execution.threads
        whole = {name for name, _ in self.task.combined} if self.task.whole else set[str]()
        self.tensors = [tensor for tensor in tensors if tensor[0] in whole]
        block = execution.block or compute.site.block
        self.over = list(spans([tensor for tensor in tensors if tensor[0] not in whole], block))
        self.elections: list[Election] = []
        self.found: dict[Span, Moments] = {}
        self.of_whole: Moments = []
        self.measure = execution.measures(self.task) and ends.out is not None
        self.newest = self.task.inputs[-1] if self.measure and execution.newest and self.task.inputs else None

    def write(self) -> Balance:
        """Compute and store every block; returns how the groups voted."""
        if self.task.whole:
            self.of_whole = assemble_tensors(self.compute, self.tensors, self.ends, self.threads, self._keep)
        self.elections = run(self._make, self.over, self.threads)
        return self.votes.balance

    @property
    def votes(self) -> Votes:
        """How the groups voted in what was written."""
        voted = list(zip((self.task.group(span.name) for span in self.over), self.elections))
        balance: Balance = {}
        for group, election in voted:
            balance[group] = balance.get(group, 0) + election.balance
        return Votes(balance, frozenset(group for group, election in voted if election.contested))

    def settle(self, balance: Balance) -> Moments:
        """Compute contested blocks again, given the votes of all groups; returns the moments of all blocks, if requested."""
        for majority, redo in self._contested(balance).items():
            run(lambda span, sign=majority: self._make(span, sign, first=False), redo, self.threads)  # type: ignore[misc]
        return [*self.of_whole, *(row for part in self.found.values() for row in part)]

    def kept(self) -> Moments:
        """The moments of what is copied and no buffer: a logit_scale that stays the base's."""
        copied = [(name, numel) for name, numel in self.task.copied if numel]
        left_out = buffers(self.task.reference, [name for name, _ in copied])
        floats = [
            (n, size)
            for n, size in copied
            if self.task.reference.tensors[n].kind.is_float and n not in left_out
        ]
        return [
            row
            for span in spans(floats if self.newest else [], BLOCK)
            for row in self._moments(span, self.task.source.raw(span.name, span.start, span.stop))
        ]

    def _make(self, span: Span, majority: int = 1, first: bool = True) -> Election:
        ends = self.ends
        state = self._state(span) if ends.held or ends.keep else None
        outcome = self.compute.span(
            span,
            state,
            majority=majority,
            finish=ends.out is not None,
            sums=(3 if self.newest else 1) if self.measure and self._is_exact(span.name) else 0,
        )
        if ends.keep and first:
            assert state is not None
            for role, array in state.items():
                name = f"{role}:{span.name}"
                ends.keep.write_stored(name, span.start, array.astype(ends.keep.storage(name), copy=False))
        if ends.out is None:
            return outcome.election
        stored = self._store(span, outcome.block)
        if self.measure:
            self.found[span] = outcome.moments or self._moments(span, stored)
        return outcome.election

    def _state(self, span: Span) -> State:
        """The stored state of a span, or a new one."""
        return (
            self.ends.held.read(span, self.task.arrays(span.name))
            if self.ends.held
            else self.compute.empty(span)
        )

    def _contested(self, balance: Balance) -> dict[int, list[Span]]:
        """The blocks to compute again, by the majority sign of their group (0 or -1)."""
        redo: dict[int, list[Span]] = {}
        for span, election in zip(self.over, self.elections):
            total = balance.get(self.task.group(span.name), 0)
            if election.contested and total <= 0:
                redo.setdefault(-1 if total < 0 else 0, []).append(span)
        return redo

    def _is_exact(self, name: str) -> bool:
        """Whether computed values are stored unchanged, so that their moments may be summed before rounding."""
        return self.task.reference.tensors[name].kind.name == "F32"

    def _keep(self, span: Span, block: np.ndarray) -> Moments:
        stored = self._store(span, block)
        return self._moments(span, stored) if self.measure else []

    def _store(self, span: Span, block: np.ndarray) -> np.ndarray:
        assert self.ends.out is not None
        info = self.task.reference.tensors[span.name]
        stored = encode(block, info.kind)
        if not stored_finite(stored, info.kind):
            self.compute.reader.refuse([0, *(expert.order for expert in self.task.inputs)])
            raise NonFiniteCheckpoint(
                f"{self.task.technique.name} gives values in {span.name} that {info.dtype} cannot hold, although every input is "
                "finite; lower scale, or merge onto a base of a wider dtype"
            )
        _write(self.task, self.ends.out, span, stored)
        return stored

    def _moments(self, span: Span, stored: np.ndarray) -> Moments:
        reader, decoded = self.compute.reader, decode(stored, self.task.reference.tensors[span.name].kind)
        expert = reader.numbers(self.newest, span) if self.newest else None
        return moments(reader.base(span), decoded, expert, self.compute.scratch)


@dataclass(frozen=True)
class Making:
    """What some tensors of the output are made for: all of them, or a file's share (`names`), of which `total` are the votes of all groups
    if they are known."""

    names: frozenset[str] | None = None
    total: Balance | None = None

    def holds(self, name: str) -> bool:
        """Whether a tensor is among them."""
        return self.names is None or name in self.names

    def decided(self, task: MergeTask, votes: Votes) -> tuple[Balance, frozenset[str]]:
        """The votes by which contested elements are settled now, and the groups that have to wait for those of other files, which count
        as plus until then."""
        if self.total is not None or self.names is None:
            return self.total or votes.balance, frozenset()
        waiting = {group for group in votes.contested if not self._is_whole(task, group)}
        return {**votes.balance, **dict.fromkeys(waiting, 1)}, frozenset(waiting)

    def _is_whole(self, task: MergeTask, group: str) -> bool:
        return all(self.holds(name) for name, _ in task.combined if task.group(name) == group)


@dataclass(frozen=True)
class Made:
    """Tensors that are made: the moments of their blocks, their votes, and the groups whose contested elements still count as plus."""

    moments: Moments
    votes: Votes
    waiting: frozenset[str] = frozenset()


def assemble(compute: Compute, ends: Ends, execution: Execution) -> Geometry | None:
    """Compute and store every block, in the order of the output's data as far as it is known; returns where the merged model lies, if
    requested."""
    task = compute.task
    if ends.out is not None:
        copy(task, ends.out)
    whole = Assembly(compute, in_order(task), ends, execution)
    found = whole.settle(whole.write())
    return Geometry.of([*found, *whole.kept()]) if whole.measure else None


def make_some(
    compute: Compute, tensors: Sequence[tuple[str, int]], out: Writer, execution: Execution, making: Making
) -> "Some":
    """Compute and store these tensors of one file of several, of which not all names need to be in the file."""
    mine = [one for one in tensors if making.names is None or one[0] in making.names]
    echoes = [one for one in tensors if one not in mine]
    ends = Ends(_InFile(out, making.names))
    parts = [Assembly(compute, some, ends, execution) for some in (mine, echoes)]
    for part in parts:
        part.write()
    return Some(parts[0], parts[1])


@dataclass(frozen=True)
class Some:
    """Tensors of a file that are written, before votes are settled. `echoes` are other names of tensors that belong to another file: they
    are made once more, and counted there."""

    mine: Assembly
    echoes: Assembly

    @property
    def votes(self) -> Votes:
        """Of the tensors of this file; contested groups of the echoes too."""
        own, other = self.mine.votes, self.echoes.votes
        return Votes(own.balance, own.contested | other.contested)

    def settle(self, decided: Balance) -> Moments:
        """Compute contested blocks again; the moments of the tensors of this file."""
        self.echoes.settle(decided)
        return self.mine.settle(decided)


class _InFile:
    """The writer of one file, to which names of other files are nothing."""

    def __init__(self, writer: Writer, names: frozenset[str] | None) -> None:
        self._writer, self._names = writer, names

    @property
    def files(self) -> Sequence[CheckpointWriter]:
        return self._writer.files

    def write_stored(self, name: str, start: int, stored: np.ndarray) -> None:
        if self._names is None or name in self._names:
            self._writer.write_stored(name, start, stored)


def assemble_in_turn(
    task: MergeTask, site: Host, found: Findings, ends: Ends, execution: Execution
) -> tuple[Geometry | None, Findings]:
    """The same as `assemble` for a task of which nothing has been looked at (`MergeTask.in_turn`): a few tensors are surveyed, made and left
    behind, so that a cold disk is read once. What was found beside what was known before."""
    made, found = make_in_turn(task, site, found, ends, execution)
    last = Assembly(Compute(task, found, site), [], ends, execution)
    return Geometry.of([*made.moments, *last.kept()]) if last.measure else None, found


def make_in_turn(
    task: MergeTask, site: Host, found: Findings, ends: Ends, execution: Execution, making: Making = Making()
) -> tuple[Made, Findings]:
    """The tensors of one file, or of all, by turns; each turn's groups are whole, so that no vote is left open."""
    assert ends.out is not None
    copy(task, ends.out, making)
    moments: list[Sequence[float]] = []
    for tensors in batches(in_file(task, making)):
        few = Few(task, tensors)
        found = prepare(task, Surveyor(task, few.combined, execution.threads).answer, found, few)
        part = make_some(Compute(task, found, site), tensors, ends.out, execution, making)
        moments += part.settle({**part.echoes.votes.balance, **part.mine.votes.balance})
    return Made(moments, Votes({}, frozenset())), found


def in_order(task: MergeTask) -> list[tuple[str, int]]:
    """The tensors of a task in the order in which a file holds them: wide numbers first."""
    infos = task.reference.tensors
    return sorted(task.merged, key=lambda tensor: -infos[tensor[0]].kind.itemsize)


def in_file(task: MergeTask, making: Making) -> list[tuple[str, int]]:
    """The tensors of which some name is in the file."""
    return [one for one in in_order(task) if any(map(making.holds, (one[0], *task.aliases.get(one[0], ()))))]


def batches(tensors: Sequence[tuple[str, int]]) -> Iterator[list[tuple[str, int]]]:
    """Runs of tensors of `TURN` elements together, or of one that is larger."""
    batch: list[tuple[str, int]] = []
    for tensor in tensors:
        batch.append(tensor)
        if sum(numel for _, numel in batch) >= TURN:
            yield batch
            batch = []
    if batch:
        yield batch


def copy(task: MergeTask, out: Writer, making: Making = Making()) -> None:
    """Store the tensors that are copied, or those of a file."""
    held = _InFile(out, making.names)
    for span in spans(
        [one for one in task.copied if any(map(making.holds, (one[0], *task.aliases.get(one[0], ()))))],
        1 << 20,
    ):
        source = task.source if span.name in task.source.tensors else task.reference
        _write(task, held, span, source.raw(span.name, span.start, span.stop))


def _write(task: MergeTask, out: Writer, span: Span, stored: np.ndarray) -> None:
    """Store a block under every name of its tensor."""
    for name in (span.name, *task.aliases.get(span.name, ())):
        out.write_stored(name, span.start, stored)
