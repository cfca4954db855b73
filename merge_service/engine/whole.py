"""Computes tensors whole, for rules that cannot work span by span; a thread holds one tensor at a time, never a model.

Invariant: the linear algebra of one tensor runs on one BLAS thread (its bits depend on their number), so results do not depend on
threads.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from merge_service.anatomy.packed import Matrix
from merge_service.blocks.moments import Moments
from merge_service.blocks.questions import EVERYTHING, Thresholds
from merge_service.blocks.spans import BLOCK, Span, dots, run, spans
from merge_service.engine.compute import Compute
from merge_service.engine.stream_state import Ends, StreamState
from merge_service.techniques.place import State

Array = np.ndarray
Store = Callable[[Span, Array], Moments]


class WholeTensor:
    """One tensor of a task, as rules use it (`techniques.rule.Tensor`)."""

    def __init__(self, compute: Compute, name: str) -> None:
        task = compute.task
        self.compute, self.task, self.name = compute, task, name
        self.numel, self.dtype, self.params = (
            task.reference.tensors[name].numel,
            task.compute(name),
            task.params,
        )
        self.pieces: Sequence[Matrix] = task.packing.matrices(name)
        self.facts, self.moves = task.facts(name), task.moves
        self._experts = {expert.order: expert for expert in task.inputs}
        self.orders: Sequence[int] = list(self._experts)

    @property
    def layer(self) -> int | None:
        return self.task.anatomy.layer(self.name)

    def empty(self) -> Array:
        return np.empty(self.numel, self.dtype)

    def base(self) -> Array | None:
        whole = Span(self.name, 0, self.numel)
        return self.compute.reader.base(whole) if self.task.base is not None else None

    def statistic(self, order: int, suffix: str = "") -> Array | None:
        evidence = self._experts[order].evidence
        return None if evidence is None else evidence.get(self.name + suffix)

    def factors(self) -> Array | None:
        evidence = next((one.evidence for one in self._experts.values()), None)
        return None if evidence is None else evidence.factors(self.name)

    def statistics_norm(self, order: int) -> float:
        evidence = self._experts[order].evidence
        return 0.0 if evidence is None else evidence.norm

    def thresholds(self, order: int) -> Thresholds:
        return self.compute.found.thresholds.get((self.task.group(self.name), order), EVERYTHING)

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
        """The stored tensor: base + scale * merged, or `merged` itself if weights are merged; logit_scale clamped."""
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


def on_one_thread() -> contextlib.AbstractContextManager[object]:
    """The context in which linear algebra runs on one thread per tensor, so that its bits do not depend on their number."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1, user_api="blas")


def assemble_tensors(
    compute: Compute, tensors: Sequence[tuple[str, int]], ends: Ends, threads: int, store: Store
) -> Moments:
    """Compute each of these tensors and pass it to `store`; returns all that `store` returned, as one list."""
    task, held, keep = compute.task, ends.held, ends.keep
    rule: Any = task.rule
    count = len(held.inputs if held else []) + len(task.inputs)

    def make(span: Span) -> Moments:
        tensor = WholeTensor(compute, span.name)
        state = _state(rule, tensor, held)
        for order in tensor.orders:
            rule.add(tensor, state, order)
        if keep:
            for role in state:
                keep.write_stored(f"{role}:{span.name}", 0, state[role])
        if rule.totals:
            return _lengths(tensor, state)
        if ends.out is None:
            return []
        return store(span, tensor.onto_base(rule.result(tensor, state, count), 1.0))

    over = [Span(name, 0, numel) for name, numel in sorted(tensors, key=lambda item: -item[1])]
    with on_one_thread():
        found = run(make, over, threads)
    if not rule.totals or keep is None:
        return [part for parts in found for part in parts]
    length = _length(found, count, ends)
    over = [Span(name, 0, numel) for name, numel in tensors] if ends.out else []
    return [part for parts in run(_again(compute, ends, length, store), over, threads) for part in parts]


def _state(rule: Any, tensor: WholeTensor, held: StreamState | None) -> State:
    arrays = rule.arrays(tensor.facts)
    if held is None:
        return {role: np.zeros(size, dtype) for role, (size, dtype) in arrays.items()}
    return {role: held.checkpoint.raw(f"{role}:{tensor.name}").copy() for role in arrays}


def _lengths(tensor: WholeTensor, state: State) -> Moments:
    """Squared norms of the state's sum and of the newest expert's task vector."""
    newest = tensor.orders[-1]
    newest_length = tensor.squared(tau for _, tau in tensor.blocks(newest))
    return [(tensor.squared(tensor.cut(state["sum"])), newest_length)]


def _length(found: Sequence[Moments], count: int, ends: Ends) -> float:
    """The factor that gives the whole model's sum the experts' mean norm; keeps the sum of their norms so far."""
    assert ends.keep is not None
    before = float(ends.held.checkpoint.raw("norms")[0]) if ends.held else 0.0
    squares = [pair for (pair,) in found]
    norms = before + math.sqrt(math.fsum(pair[1] for pair in squares))
    ends.keep.write_stored("norms", 0, np.array([norms]))
    norm = math.sqrt(math.fsum(pair[0] for pair in squares))
    return norms / count / norm if norm and count > 1 else 1.0


def _again(compute: Compute, ends: Ends, length: float, store: Store) -> Callable[[Span], Moments]:
    """The second pass over tensors: the norm of the whole model's sum is known now, so every tensor can be scaled."""

    def make(span: Span) -> Moments:
        assert ends.keep is not None
        merged = ends.keep.read_back(f"sum:{span.name}")
        return store(span, WholeTensor(compute, span.name).onto_base(merged, length))

    return make
