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
from merge_service.checkpoints.writer import Writer
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
        balance: Balance = {}
        for span, election in zip(self.over, self.elections):
            key = self.task.group(span.name)
            balance[key] = balance.get(key, 0) + election.balance
        return balance

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


def assemble(compute: Compute, ends: Ends, execution: Execution) -> Geometry | None:
    """Compute and store every block, in the order of the output's data as far as it is known; returns where the merged model lies, if
    requested."""
    task = compute.task
    if ends.out is not None:
        copy(task, ends.out)
    whole = Assembly(compute, in_order(task), ends, execution)
    found = whole.settle(whole.write())
    return Geometry.of([*found, *whole.kept()]) if whole.measure else None


def assemble_in_turn(
    task: MergeTask, site: Host, found: Findings, ends: Ends, execution: Execution
) -> tuple[Geometry | None, Findings]:
    """The same for a task of which nothing has been looked at (`MergeTask.in_turn`): a few tensors are surveyed, made and left behind, so
    that a cold disk is read once. What was found beside what was known before."""
    assert ends.out is not None
    copy(task, ends.out)
    moments: list[Sequence[float]] = []
    for tensors in batches(in_order(task)):
        few = Few(task, tensors)
        found = prepare(task, Surveyor(task, few.combined, execution.threads).answer, found, few)
        part = Assembly(Compute(task, found, site), tensors, ends, execution)
        moments += part.settle(part.write())
    last = Assembly(Compute(task, found, site), [], ends, execution)
    return Geometry.of([*moments, *last.kept()]) if last.measure else None, found


def in_order(task: MergeTask) -> list[tuple[str, int]]:
    """The tensors of a task in the order in which a file holds them: wide numbers first."""
    infos = task.reference.tensors
    return sorted(task.merged, key=lambda tensor: -infos[tensor[0]].kind.itemsize)


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


def copy(task: MergeTask, out: Writer) -> None:
    """Store the tensors that are copied."""
    for span in spans(task.copied, 1 << 20):
        source = task.source if span.name in task.source.tensors else task.reference
        _write(task, out, span, source.raw(span.name, span.start, span.stop))


def _write(task: MergeTask, out: Writer, span: Span, stored: np.ndarray) -> None:
    """Store a block under every name of its tensor."""
    for name in (span.name, *task.aliases.get(span.name, ())):
        out.write_stored(name, span.start, stored)
