"""Computing and storing every block of a blend.

Each block is read, merged, rounded and written before the next one, on any number of threads. The one thing that is
not known block by block is the majority sign that settles votes which cancel exactly; those blocks are made again.

Invariant: the bytes written do not depend on the size or order of blocks, or on threads.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from merge_service.blocks.spans import Span, dots, run, spans
from merge_service.checkpoints.dtypes import decode, encode, stored_finite
from merge_service.checkpoints.writer import CheckpointWriter, Writer
from merge_service.engine.blend import Blend
from merge_service.engine.stream_state import StreamState
from merge_service.engine.whole import assemble_tensors
from merge_service.errors import NonFiniteCheckpoint
from merge_service.techniques.place import Election, State


@dataclass(frozen=True)
class Options:
    """How to run, which never changes what comes out."""

    threads: int
    block: int
    measure: bool
    device: str | None = None


Balance = dict[str, int]
"""Per group of tensors: elements that elected plus, minus those that elected minus."""


class Assembly:
    """The making of some tensors of a blend. Others may be made elsewhere: only `Balance`s have to be added up between.

    The sign of elements whose vote cancels exactly is only known when the group has been counted, so `write` makes blocks
    as if it were plus, and `settle` makes the few that hold such elements again where it is not.
    """

    def __init__(
        self,
        blend: Blend,
        tensors: Sequence[tuple[str, int]],
        writer: Writer | None,
        options: Options,
        held: StreamState | None = None,
        keep: CheckpointWriter | None = None,
    ) -> None:
        self.blend, self.writer, self.options, self.held, self.keep = blend, writer, options, held, keep
        whole = {name for name, _ in blend.combined} if blend.whole else set[str]()
        self.tensors = [tensor for tensor in tensors if tensor[0] in whole]
        self.over = list(spans([tensor for tensor in tensors if tensor[0] not in whole], options.block))
        self.elections: list[Election] = []
        self.norms: dict[Span, list[float]] = {}
        self.squares: list[float] = []
        self.measure = is_measured(blend, options) and writer is not None

    def write(self) -> Balance:
        """Make and store every block; how the groups voted."""
        if self.blend.whole:
            self.squares = assemble_tensors(self, self._store)
        self.elections = run(self._make, self.over, self.options.threads)
        balance: Balance = {}
        for span, election in zip(self.over, self.elections):
            key = self.blend.group(span.name)
            balance[key] = balance.get(key, 0) + election.balance
        return balance

    def settle(self, balance: Balance) -> list[float]:
        """Make contested blocks again, now that all have voted; partial sums of (merged - base)^2, if asked for."""
        for majority, redo in self._contested(balance).items():
            run(lambda span, sign=majority: self._make(span, sign, first=False), redo, self.options.threads)  # type: ignore[misc]
        return [*self.squares, *(x for part in self.norms.values() for x in part)]

    def _store(self, span: Span, block: np.ndarray) -> list[float]:
        assert self.writer is not None
        stored = _store(self.blend, self.writer, span, block)
        return _squares(self.blend, span, stored) if self.measure else []

    def _make(self, span: Span, majority: int = 1, first: bool = True) -> Election:
        blend, writer = self.blend, self.writer
        state = _state(blend, span, self.held) if self.held or self.keep else None
        outcome = blend.compute_span(
            span,
            state,
            majority=majority,
            finish=writer is not None,
            squares=self.measure and _is_exact(blend, span.name),
        )
        if self.keep and first:
            assert state is not None
            for role, array in state.items():
                name = f"{role}:{span.name}"
                self.keep.write_stored(name, span.start, array.astype(self.keep.storage(name), copy=False))
        if writer is None:
            return outcome.election
        stored = _store(blend, writer, span, outcome.block)
        if self.measure:
            self.norms[span] = outcome.squares or _squares(blend, span, stored)
        return outcome.election

    def _contested(self, balance: Balance) -> dict[int, list[Span]]:
        """The blocks to make again, by the majority sign of their group (0 or -1)."""
        redo: dict[int, list[Span]] = {}
        for span, election in zip(self.over, self.elections):
            total = balance.get(self.blend.group(span.name), 0)
            if election.contested and total <= 0:
                redo.setdefault(-1 if total < 0 else 0, []).append(span)
        return redo


def assemble(
    blend: Blend,
    writer: Writer | None,
    options: Options,
    held: StreamState | None = None,
    keep: CheckpointWriter | None = None,
) -> float | None:
    """Compute and store every block; the norm of the merged task vector if asked for."""
    whole = Assembly(blend, blend.merged, writer, options, held, keep)
    squares = whole.settle(whole.write())
    if writer is not None:
        copy(blend, writer)
    return math.sqrt(math.fsum(squares)) if whole.measure else None


def is_measured(blend: Blend, options: Options) -> bool:
    """Whether the norm of merged - base is asked for, and there is a base."""
    return options.measure and blend.base is not None


def _state(blend: Blend, span: Span, held: StreamState | None) -> State:
    """The state of a span as it was left, or a new one."""
    arrays = blend.arrays(span.name)
    if held:
        return held.read(span, arrays)
    return {role: np.zeros(span.size, dtype) for role, dtype in arrays.items()}


def _is_exact(blend: Blend, name: str) -> bool:
    """Whether what is computed is what is stored, so that its squares may be summed before it is rounded."""
    return blend.reference.tensors[name].kind.name == "F32"


def _squares(blend: Blend, span: Span, stored: np.ndarray) -> list[float]:
    """Partial sums of (stored - base)^2."""
    decoded = decode(stored, blend.reference.tensors[span.name].kind)
    moved = np.subtract(decoded, blend.base_block(span))
    return dots(moved, moved, blend.scratch)


def _store(blend: Blend, writer: Writer, span: Span, block: np.ndarray) -> np.ndarray:
    info = blend.reference.tensors[span.name]
    stored = encode(block, info.kind)
    if not stored_finite(stored, info.kind):
        raise NonFiniteCheckpoint(
            f"{blend.technique.name} gives values in {span.name} that {info.dtype} cannot hold, although every input is "
            "finite; lower scale, or merge onto a base of a wider dtype"
        )
    writer.write_stored(span.name, span.start, stored)
    for alias in blend.aliases.get(span.name, ()):
        writer.write_stored(alias, span.start, stored)
    return stored


def copy(blend: Blend, writer: Writer) -> None:
    """Store the tensors that are taken over as they are."""
    for span in spans(blend.copied, 1 << 20):
        source = blend.source if span.name in blend.source.tensors else blend.reference
        stored = source.raw(span.name, span.start, span.stop)
        writer.write_stored(span.name, span.start, stored)
        for alias in blend.aliases.get(span.name, ()):
            writer.write_stored(alias, span.start, stored)
