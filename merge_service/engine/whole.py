"""Making tensors whole, for rules that cannot work span by span: a tensor at a time is in memory per thread, never a model.

Invariant: the linear algebra of one tensor runs on one BLAS thread (its bits depend on their number), so results do not depend on
threads.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from merge_service.anatomy.packed import Matrix
from merge_service.blocks.spans import BLOCK, Span, dots, run, spans
from merge_service.engine.compute import Compute
from merge_service.engine.stream_state import Ends, StreamState
from merge_service.techniques.place import State

Array = np.ndarray
Store = Callable[[Span, Array], list[float]]


class WholeTensor:
    """One tensor of a task, as a rule sees it (`techniques.tensorwise.Tensor`)."""

    def __init__(self, compute: Compute, name: str) -> None:
        task = compute.task
        self.compute, self.task, self.name = compute, task, name
        self.numel, self.dtype, self.params = (
            task.reference.tensors[name].numel,
            task.compute(name),
            task.params,
        )
        averaged = self.params.get("text_projection") == "mean" and "text_projection" in name
        self.pieces: Sequence[Matrix] = [] if averaged else task.packing.matrices(name)
        self._experts = {expert.order: expert for expert in task.inputs}
        self.orders: Sequence[int] = list(self._experts)

    def blocks(self, order: int) -> Iterator[tuple[slice, Array]]:
        for span in spans([(self.name, self.numel)], BLOCK):
            yield slice(span.start, span.stop), self._read(order, span)

    def whole(self, order: int) -> Array:
        return self._read(order, Span(self.name, 0, self.numel))

    def matrix(self, order: int, piece: Matrix) -> Array:
        return piece.of(self._read(order, Span(self.name, piece.start, piece.stop)))

    def solve(self, function: Callable[..., Any], *matrices: Array, **options: Any) -> Array:
        site = self.compute.site
        with site.turn():
            return site.fetch(function(*map(site.put, matrices), **options, xp=site.xp))

    def put(self, matrix: Array) -> Any:
        return self.compute.site.put(matrix)

    def squared(self, values: Iterable[Array]) -> float:
        return math.fsum(part for block in values for part in dots(block, block, self.compute.scratch))

    def cut(self, array: Array) -> Sequence[Array]:
        return [array[at : at + BLOCK] for at in range(0, self.numel, BLOCK)]

    def onto_base(self, merged: Array, length: float) -> Array:
        """The tensor that is stored: base + scale * merged, or merged itself where weights are merged; logit_scale clamped."""
        span = Span(self.name, 0, self.numel)
        if self.task.moves:
            base = self.compute.reader.base(span)
            merged = base - (
                0 - merged * (self.task.factors[self.name] * length)
            )  # the sign of zero: see rules
        return self.compute.clamped(span, merged)

    def _read(self, order: int, span: Span) -> Array:
        reader, expert = self.compute.reader, self._experts[order]
        return reader.delta(expert, span) if self.task.moves else reader.numbers(expert, span)


def assemble_tensors(
    compute: Compute, tensors: Sequence[tuple[str, int]], ends: Ends, threads: int, store: Store
) -> list[float]:
    """Make every one of these tensors and hand it to `store`; what that returns, together."""
    from threadpoolctl import threadpool_limits

    task, held, keep = compute.task, ends.held, ends.keep
    rule: Any = task.rule
    count = len(held.inputs if held else []) + len(task.inputs)

    def make(span: Span) -> list[float]:
        tensor = WholeTensor(compute, span.name)
        state = _state(rule, tensor, held)
        for order in tensor.orders:
            rule.add(tensor, state, order)
        if keep:
            for role in (*rule.floats, *rule.tallies):
                keep.write_stored(f"{role}:{span.name}", 0, state[role])
        if rule.totals:
            return _lengths(tensor, state)
        if ends.out is None:
            return []
        return store(span, tensor.onto_base(rule.result(tensor, state, count), 1.0))

    over = [Span(name, 0, numel) for name, numel in sorted(tensors, key=lambda item: -item[1])]
    with threadpool_limits(1, user_api="blas"):
        found = run(make, over, threads)
    if not rule.totals or not over:
        return [part for parts in found for part in parts]
    length = _length(found, count, ends)
    over = [Span(name, 0, numel) for name, numel in tensors] if ends.out else []
    return [part for parts in run(_again(compute, ends, length, store), over, threads) for part in parts]


def _state(rule: Any, tensor: WholeTensor, held: StreamState | None) -> State:
    arrays = dict.fromkeys(rule.floats, (tensor.numel, tensor.dtype))
    arrays |= {role: (1, np.dtype(np.uint32)) for role in rule.tallies}
    if held is None:
        return {role: np.zeros(size, dtype) for role, (size, dtype) in arrays.items()}
    return {role: held.checkpoint.raw(f"{role}:{tensor.name}").copy() for role in arrays}


def _lengths(tensor: WholeTensor, state: State) -> list[float]:
    """Squared norms of the state's sum and of the newest expert's task vector."""
    newest = tensor.orders[-1]
    return [
        tensor.squared(tensor.cut(state["sum"])),
        tensor.squared(tau for _, tau in tensor.blocks(newest)),
    ]


def _length(squares: Sequence[Sequence[float]], count: int, ends: Ends) -> float:
    """What the sum of a whole model is multiplied by to have the experts' mean length; their norms so far are kept."""
    assert ends.keep is not None
    before = float(ends.held.checkpoint.raw("norms")[0]) if ends.held else 0.0
    norms = before + math.sqrt(math.fsum(pair[1] for pair in squares))
    ends.keep.write_stored("norms", 0, np.array([norms]))
    norm = math.sqrt(math.fsum(pair[0] for pair in squares))
    return norms / count / norm if norm and count > 1 else 1.0


def _again(compute: Compute, ends: Ends, length: float, store: Store) -> Callable[[Span], list[float]]:
    """The second pass over tensors: the length of the whole model's sum is known now, so every tensor can be scaled."""

    def make(span: Span) -> list[float]:
        assert ends.keep is not None
        merged = ends.keep.read_back(f"sum:{span.name}")
        return store(span, WholeTensor(compute, span.name).onto_base(merged, length))

    return make
