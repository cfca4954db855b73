"""Computing and storing every block of a blend.

Each block is read, merged, rounded and written before the next one, on any number of threads. The one thing that is
not known block by block is the majority sign that settles votes which cancel exactly; those blocks are made again.

Invariant: the bytes written do not depend on the size or order of blocks, or on threads.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from merge_service.blend import Blend
from merge_service.checkpoint import CheckpointWriter
from merge_service.dtypes import decode, encode, stored_finite
from merge_service.engine import Span, dots, run, spans
from merge_service.errors import NonFiniteCheckpoint
from merge_service.rules import Election, State
from merge_service.state import StreamState
from merge_service.writer import Writer


@dataclass(frozen=True)
class Options:
    """How to run, which never changes what comes out."""

    threads: int
    block: int
    measure: bool


def assemble(
    blend: Blend,
    writer: Writer | None,
    options: Options,
    held: StreamState | None = None,
    keep: CheckpointWriter | None = None,
) -> float | None:
    """Compute and store every block; the norm of the merged task vector if asked for.

    The sign of elements whose vote cancels exactly is only known when the group has been counted, so blocks are made as
    if it were plus, and the few that hold such elements are made again where it is not.
    """
    norms: dict[Span, list[float]] = {}
    measure = options.measure and blend.base is not None and writer is not None

    def make(span: Span, majority: int = 1, first: bool = True) -> Election:
        state = _state(blend, span, held) if held or keep else None
        outcome = blend.compute_span(
            span,
            state,
            majority=majority,
            finish=writer is not None,
            squares=measure and _is_exact(blend, span.name),
        )
        if keep and first:
            assert state is not None
            for role, array in state.items():
                keep.write_stored(
                    f"{role}:{span.name}",
                    span.start,
                    array.astype(keep.storage(f"{role}:{span.name}"), copy=False),
                )
        if writer is None:
            return outcome.election
        stored = _store(blend, writer, span, outcome.block)
        if measure:
            norms[span] = outcome.squares or _squares(blend, span, stored)
        return outcome.election

    over = list(spans(blend.merged, options.block))
    elections = run(make, over, options.threads)
    for majority, redo in _contested(blend, over, elections).items():
        run(lambda span, sign=majority: make(span, sign, first=False), redo, options.threads)  # type: ignore[misc]
    if writer is not None:
        _copy(blend, writer)
    return math.sqrt(math.fsum(x for part in norms.values() for x in part)) if measure else None


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


def _contested(blend: Blend, over: Sequence[Span], elections: Sequence[Election]) -> dict[int, list[Span]]:
    """The blocks to make again, by the majority sign of their group (0 or -1)."""
    balance: dict[str, int] = {}
    for span, election in zip(over, elections):
        key = blend.group(span.name)
        balance[key] = balance.get(key, 0) + election.balance
    redo: dict[int, list[Span]] = {}
    for span, election in zip(over, elections):
        total = balance[blend.group(span.name)]
        if election.contested and total <= 0:
            redo.setdefault(-1 if total < 0 else 0, []).append(span)
    return redo


def _store(blend: Blend, writer: Writer, span: Span, block: np.ndarray) -> np.ndarray:
    info = blend.reference.tensors[span.name]
    stored = encode(block, info.kind)
    if not stored_finite(stored, info.kind):
        raise NonFiniteCheckpoint(
            f"{blend.technique.name} gives values in {span.name} that {info.dtype} cannot hold, although every input is "
            "finite; lower scale, or merge onto a base of a wider dtype"
        )
    writer.write_stored(span.name, span.start, stored)
    for alias, name in blend.tied.items():
        if name == span.name:
            writer.write_stored(alias, span.start, stored)
    return stored


def _copy(blend: Blend, writer: Writer) -> None:
    for span in spans(blend.copied, 1 << 20):
        stored = blend.source.raw(span.name, span.start, span.stop)
        writer.write_stored(span.name, span.start, stored)
        for alias in [alias for alias, name in blend.tied.items() if name == span.name]:
            writer.write_stored(alias, span.start, stored)
