"""Computing and storing every block of a merge.

Each block is read, merged, rounded and written before the next one, on any number of threads. The one thing that is
not known block by block is the majority sign that settles votes which cancel exactly; those blocks are made again.

Invariant: the bytes written do not depend on the size or order of blocks, or on threads.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from merge_service.blocks.spans import BLOCK, Span, dots, run, spans
from merge_service.checkpoints.dtypes import decode, encode, stored_finite
from merge_service.checkpoints.writer import Writer
from merge_service.engine.compute import Compute
from merge_service.engine.stream_state import Ends
from merge_service.engine.task import MergeTask
from merge_service.engine.whole import assemble_tensors
from merge_service.errors import NonFiniteCheckpoint
from merge_service.techniques.place import Election, State


@dataclass(frozen=True)
class Execution:
    """How a merge is carried out, which never changes what comes out. `measure`: whether its norm is asked for."""

    threads: int = 1
    block: int = BLOCK
    measure: bool = True
    device: str | None = None

    def measures(self, task: MergeTask) -> bool:
        """Whether the norm of merged - base is asked for, and there is a base."""
        return self.measure and task.base is not None


Balance = dict[str, int]
"""Per group of tensors: elements that elected plus, minus those that elected minus."""


class Assembly:
    """The making of some tensors of a task. Others may be made elsewhere: only `Balance`s have to be added up between.

    The sign of elements whose vote cancels exactly is only known when the group has been counted, so `write` makes blocks
    as if it were plus, and `settle` makes the few that hold such elements again where it is not.
    """

    def __init__(
        self, compute: Compute, tensors: Sequence[tuple[str, int]], ends: Ends, execution: Execution
    ) -> None:
        self.compute, self.task, self.ends, self.threads = compute, compute.task, ends, execution.threads
        whole = {name for name, _ in self.task.combined} if self.task.whole else set[str]()
        self.tensors = [tensor for tensor in tensors if tensor[0] in whole]
        self.over = list(spans([tensor for tensor in tensors if tensor[0] not in whole], execution.block))
        self.elections: list[Election] = []
        self.norms: dict[Span, list[float]] = {}
        self.squares: list[float] = []
        self.measure = execution.measures(self.task) and ends.out is not None

    def write(self) -> Balance:
        """Make and store every block; how the groups voted."""
        if self.task.whole:
            self.squares = assemble_tensors(self.compute, self.tensors, self.ends, self.threads, self._keep)
        self.elections = run(self._make, self.over, self.threads)
        balance: Balance = {}
        for span, election in zip(self.over, self.elections):
            key = self.task.group(span.name)
            balance[key] = balance.get(key, 0) + election.balance
        return balance

    def settle(self, balance: Balance) -> list[float]:
        """Make contested blocks again, now that all have voted; partial sums of (merged - base)^2, if asked for."""
        for majority, redo in self._contested(balance).items():
            run(lambda span, sign=majority: self._make(span, sign, first=False), redo, self.threads)  # type: ignore[misc]
        return [*self.squares, *(x for part in self.norms.values() for x in part)]

    def _make(self, span: Span, majority: int = 1, first: bool = True) -> Election:
        ends = self.ends
        state = self._state(span) if ends.held or ends.keep else None
        outcome = self.compute.span(
            span,
            state,
            majority=majority,
            finish=ends.out is not None,
            squares=self.measure and self._is_exact(span.name),
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
            self.norms[span] = outcome.squares or self._squares(span, stored)
        return outcome.election

    def _state(self, span: Span) -> State:
        """The state of a span as it was left, or a new one."""
        return (
            self.ends.held.read(span, self.task.arrays(span.name))
            if self.ends.held
            else self.compute.empty(span)
        )

    def _contested(self, balance: Balance) -> dict[int, list[Span]]:
        """The blocks to make again, by the majority sign of their group (0 or -1)."""
        redo: dict[int, list[Span]] = {}
        for span, election in zip(self.over, self.elections):
            total = balance.get(self.task.group(span.name), 0)
            if election.contested and total <= 0:
                redo.setdefault(-1 if total < 0 else 0, []).append(span)
        return redo

    def _is_exact(self, name: str) -> bool:
        """Whether what is computed is what is stored, so that its squares may be summed before it is rounded."""
        return self.task.reference.tensors[name].kind.name == "F32"

    def _keep(self, span: Span, block: np.ndarray) -> list[float]:
        stored = self._store(span, block)
        return self._squares(span, stored) if self.measure else []

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

    def _squares(self, span: Span, stored: np.ndarray) -> list[float]:
        """Partial sums of (stored - base)^2."""
        decoded = decode(stored, self.task.reference.tensors[span.name].kind)
        moved = np.subtract(decoded, self.compute.reader.base(span))
        return dots(moved, moved, self.compute.scratch)


def assemble(compute: Compute, ends: Ends, execution: Execution) -> float | None:
    """Compute and store every block; the norm of the merged task vector if asked for."""
    whole = Assembly(compute, compute.task.merged, ends, execution)
    squares = whole.settle(whole.write())
    if ends.out is not None:
        copy(compute.task, ends.out)
    return math.sqrt(math.fsum(squares)) if whole.measure else None


def copy(task: MergeTask, out: Writer) -> None:
    """Store the tensors that are taken over as they are."""
    for span in spans(task.copied, 1 << 20):
        source = task.source if span.name in task.source.tensors else task.reference
        _write(task, out, span, source.raw(span.name, span.start, span.stop))


def _write(task: MergeTask, out: Writer, span: Span, stored: np.ndarray) -> None:
    """Store a block under every name that its tensor has."""
    for name in (span.name, *task.aliases.get(span.name, ())):
        out.write_stored(name, span.start, stored)
