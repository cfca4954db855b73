"""Techniques that must see a tensor whole: singular vectors, or a factor that depends on all of its elements.

A rule adds one expert at a time to the state of one tensor and turns it into what is merged; matrices are handed to
`matrices.py`, everything that is no matrix is averaged or summed. A tensor at a time is in memory per thread, never a model.

Invariant: the linear algebra of one tensor runs on one BLAS thread (its bits depend on their number), sums over a tensor
are taken as everywhere, so results do not depend on threads.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from merge_service.anatomy.packed import Matrix
from merge_service.blocks.spans import BLOCK, Span, dots, run, spans
from merge_service.engine.stream_state import StreamState
from merge_service.techniques.matrices import isotropic, isotropic_task_specific, opcm_project, rapf_fuse
from merge_service.techniques.place import State
from merge_service.techniques.rules import share
from merge_service.techniques.spherical import mean_cosine, model_stock

if TYPE_CHECKING:
    from merge_service.engine.assembly import Assembly
    from merge_service.engine.blend import Blend, Input

Array = np.ndarray


class Tensor:
    """One tensor of a blend, as a rule sees it."""

    def __init__(self, blend: "Blend", name: str) -> None:
        info = blend.reference.tensors[name]
        self.blend, self.name, self.numel, self.dtype = blend, name, info.numel, blend.compute(name)
        self.params = blend.params
        averaged = self.params.get("text_projection") == "mean" and "text_projection" in name
        self.pieces: list[Matrix] = [] if averaged else blend.packing.matrices(name)
        """Where its matrices lie."""

    def blocks(self, expert: "Input") -> Iterator[tuple[slice, Array]]:
        """An expert's task vector (its weights, if those are merged), block by block."""
        for span in spans([(self.name, self.numel)], BLOCK):
            x = self.blend.numbers(expert, span)
            yield (
                slice(span.start, span.stop),
                x - self.blend.base_block(span) if self.blend.moves else x,
            )

    def whole(self, expert: "Input", start: int = 0, stop: int | None = None) -> Array:
        """Elements start..stop of the same, in one array."""
        span = Span(self.name, start, self.numel if stop is None else stop)
        x = self.blend.numbers(expert, span)
        return x - self.blend.base_block(span) if self.blend.moves else x

    def matrix(self, expert: "Input", piece: Matrix) -> Array:
        """One matrix of the same."""
        return piece.of(self.whole(expert, piece.start, piece.stop))

    def solve(self, function: Callable[..., Any], *matrices: Array, **options: Any) -> Array:
        """A function of `matrices.py`, where blocks are worked on."""
        site = self.blend.site
        with site.turn():
            return site.fetch(function(*map(site.put, matrices), **options, xp=site.xp))

    def squared(self, values: Iterator[Array] | Sequence[Array]) -> float:
        """The squared norm of a vector given in blocks of whole grains."""
        return math.fsum(part for block in values for part in dots(block, block, self.blend.scratch))


class TensorRule(Protocol):
    """How experts come together in one tensor.

    `floats` names arrays of the tensor's size, `tallies` numbers per tensor, `totals` numbers of the whole model, all of
    which are the streaming state and start at zero. `words` and `kernel` are those of `rules.Combine`: none here.
    """

    floats: tuple[str, ...]
    tallies: tuple[str, ...]
    totals: tuple[str, ...]
    words: tuple[str, ...]
    kernel: int | None

    def add(self, tensor: Tensor, state: State, expert: "Input") -> None:
        """Take one expert into the state of a tensor, in place."""

    def result(self, tensor: Tensor, state: State, count: int) -> Array:
        """What `count` experts come to: a task vector (weights, if those are merged), flattened."""


class _Rule:
    floats: tuple[str, ...] = ("sum",)
    tallies: tuple[str, ...] = ()
    totals: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    kernel: int | None = None

    def add(self, tensor: Tensor, state: State, expert: "Input") -> None:
        for where, tau in tensor.blocks(expert):
            state["sum"][where] += tau

    def _by_matrix(
        self, tensor: Tensor, otherwise: Callable[[], Array], solve: Callable[[Matrix], Array]
    ) -> Array:
        if not tensor.pieces:
            return otherwise()
        out = np.empty(tensor.numel, tensor.dtype)
        for piece in tensor.pieces:
            piece.put(out[piece.start : piece.stop], solve(piece))
        return out


class Isotropic(_Rule):
    """Iso-C: the summed matrix with all singular values made equal; the mean where there is no matrix."""

    def result(self, tensor: Tensor, state: State, count: int) -> Array:
        def solve(piece: Matrix) -> Array:
            return tensor.solve(isotropic, _held(state, piece))

        return self._by_matrix(tensor, lambda: state["sum"] / tensor.dtype.type(count), solve)


class IsotropicTasks(_Rule):
    """Iso-CTS: as Iso-C, with directions of every expert's own; reads the experts a second time."""

    def result(self, tensor: Tensor, state: State, count: int) -> Array:
        def solve(piece: Matrix) -> Array:
            put = tensor.blend.site.put
            taus = (put(tensor.matrix(expert, piece)) for expert in tensor.blend.inputs)
            fraction = tensor.params["common_fraction"]
            return tensor.solve(
                isotropic_task_specific, _held(state, piece), taus=taus, count=count, common_fraction=fraction
            )

        return self._by_matrix(tensor, lambda: state["sum"] / tensor.dtype.type(count), solve)


class Orthogonal(_Rule):
    """OPCM: a sum of task vectors, each without what lies along the sum so far.

    The published recursion keeps the merged task vector and a factor; their product is this sum, so only the length needs
    to be known at the end: the mean of the experts' (`Lengths`).
    """

    totals = ("norms",)

    def add(self, tensor: Tensor, state: State, expert: "Input") -> None:
        if not tensor.pieces or expert.order == 1:
            super().add(tensor, state, expert)
            return
        for piece in tensor.pieces:
            held, tau = _held(state, piece), tensor.matrix(expert, piece)
            kept = tensor.solve(opcm_project, held, tau, alpha=tensor.params["alpha"])
            piece.put(state["sum"][piece.start : piece.stop], held + kept)

    def result(self, tensor: Tensor, state: State, count: int) -> Array:
        return state["sum"].copy()


class Stock:
    """Model Stock: the mean task vector, as far out as the experts agree on its direction."""

    floats: tuple[str, ...] = ("mean", "unit")
    tallies: tuple[str, ...] = ("zeros",)
    totals: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    kernel: int | None = None

    def add(self, tensor: Tensor, state: State, expert: "Input") -> None:
        norm = math.sqrt(tensor.squared(tau for _, tau in tensor.blocks(expert)))
        if norm == 0:
            state["zeros"] += 1
        for where, tau in tensor.blocks(expert):
            mean = state["mean"][where]
            state["mean"][where] = mean - (mean - tau) * (1 / expert.order)
            if norm:
                state["unit"][where] += tau * (1 / norm)

    def result(self, tensor: Tensor, state: State, count: int) -> Array:
        unit, zeros = state["unit"], int(state["zeros"][0])
        agreement = tensor.squared([unit[a : a + BLOCK] for a in range(0, tensor.numel, BLOCK)])
        cosine = mean_cosine(agreement, count, zeros)
        return state["mean"] * model_stock(cosine, count, tensor.name, raw=tensor.params["ratio"] == "raw")


class FusedMatrices(_Rule):
    """RAPF: old and new mixed in the axes of the old; what is no matrix is the new one's."""

    floats: tuple[str, ...] = ()

    def add(self, tensor: Tensor, state: State, expert: "Input") -> None:
        pass

    def result(self, tensor: Tensor, state: State, count: int) -> Array:
        running, new = tensor.blend.inputs[0], tensor.blend.inputs[-1]

        def solve(piece: Matrix) -> Array:
            old, fresh = (tensor.matrix(one, piece) for one in (running, new))
            return tensor.solve(rapf_fuse, old, fresh, b=tensor.params["floor"])

        return self._by_matrix(tensor, lambda: tensor.whole(new).copy(), solve)


RULES: Mapping[str, type[_Rule] | type[Stock]] = {
    "isotropic": Isotropic,
    "isotropic_tasks": IsotropicTasks,
    "orthogonal": Orthogonal,
    "stock": Stock,
    "fused_matrices": FusedMatrices,
}


Store = Callable[[Span, Array], list[float]]


def _held(state: State, piece: Matrix) -> Array:
    """A matrix of the sum so far."""
    return piece.of(state["sum"][piece.start : piece.stop])


def assemble_tensors(assembly: "Assembly", store: Store) -> list[float]:
    """Make every tensor of an assembly and hand it to `store`; what that returns, together."""
    from threadpoolctl import threadpool_limits

    blend, held, keep = assembly.blend, assembly.held, assembly.keep
    rule: Any = blend.combine
    count = len(held.inputs if held else []) + len(blend.inputs)

    def make(span: Span) -> list[float]:
        tensor = Tensor(blend, span.name)
        state = _state(rule, tensor, held)
        for expert in blend.inputs:
            rule.add(tensor, state, expert)
        if keep:
            for role in (*rule.floats, *rule.tallies):
                keep.write_stored(f"{role}:{span.name}", 0, state[role])
        if rule.totals:
            return _lengths(tensor, state)
        if assembly.writer is None:
            return []
        return store(span, onto_base(tensor, rule.result(tensor, state, count), 1.0))

    over = [Span(name, 0, numel) for name, numel in sorted(assembly.tensors, key=lambda item: -item[1])]
    with threadpool_limits(1, user_api="blas"):
        found = run(make, over, assembly.options.threads)
    if rule.totals and over:
        return _second(assembly, store, count, found)
    return [part for parts in found for part in parts]


def onto_base(tensor: Tensor, merged: Array, length: float) -> Array:
    """The tensor that is stored: base + scale * merged, or merged itself where weights are merged; logit_scale clamped."""
    span, blend = Span(tensor.name, 0, tensor.numel), tensor.blend
    if blend.moves:
        base = blend.base_block(span)
        merged = base - (0 - merged * (blend.factors[tensor.name] * length))  # the sign of zero: see rules
    return blend.clamped(span, merged)


def _state(rule: Any, tensor: Tensor, held: StreamState | None) -> State:
    arrays = dict.fromkeys(rule.floats, (tensor.numel, tensor.dtype))
    arrays |= {role: (1, np.dtype(np.uint32)) for role in rule.tallies}
    if held is None:
        return {role: np.zeros(size, dtype) for role, (size, dtype) in arrays.items()}
    return {role: held.checkpoint.raw(f"{role}:{tensor.name}").copy() for role in arrays}


def _lengths(tensor: Tensor, state: State) -> list[float]:
    """Squared norms of the state's sum and of the newest expert's task vector."""
    newest = tensor.blend.inputs[-1]
    total = state["sum"]
    return [
        tensor.squared([total[a : a + BLOCK] for a in range(0, tensor.numel, BLOCK)]),
        tensor.squared(tau for _, tau in tensor.blocks(newest)),
    ]


def _second(assembly: "Assembly", store: Store, count: int, squares: list[list[float]]) -> list[float]:
    """OPCM's second pass: the length of the whole model's sum is known now, so every tensor can be scaled."""
    blend, held, keep = assembly.blend, assembly.held, assembly.keep
    assert keep is not None
    before = float(held.checkpoint.raw("norms")[0]) if held else 0.0
    norms = before + math.sqrt(math.fsum(pair[1] for pair in squares))
    keep.write_stored("norms", 0, np.array([norms]))
    norm = math.sqrt(math.fsum(pair[0] for pair in squares))
    length = norms / count / norm if norm and count > 1 else 1.0

    def make(span: Span) -> list[float]:
        tensor = Tensor(blend, span.name)
        return store(span, onto_base(tensor, keep.read_back(f"sum:{span.name}"), length))

    over = [Span(name, 0, numel) for name, numel in assembly.tensors] if assembly.writer else []
    return [part for parts in run(make, over, assembly.options.threads) for part in parts]


def coefficients(blend: "Blend", grams: Mapping[str, Array]) -> dict[tuple[str, int], tuple[float, float]]:
    """The `Place.turn` of every expert in every tensor, for techniques that go along an arc; none where a line is taken."""
    from merge_service.techniques import spherical

    name, params = blend.technique.name, blend.params
    weights = _weights(params, len(blend.inputs))
    turns = {}
    for tensor, gram in grams.items():
        if name == "nuslerp":
            found = spherical.nuslerp(gram, weights[1])
        elif name == "multislerp":
            found = spherical.multislerp(gram, weights, tensor)
        else:
            found = spherical.karcher(gram, weights, tensor, params["iterations"], params["tolerance"])
        for expert, factor in zip(blend.inputs, found or []):
            turns[tensor, expert.order] = (float(expert.order != 1), factor)
    return turns


def _weights(params: Mapping[str, Any], count: int) -> list[float]:
    """What every expert weighs in the mean of all: its share when it came, less what later ones took."""
    left, weights = 1.0, []
    for order in range(count, 0, -1):
        part = share(params, order)
        weights.append(left * part)
        left *= 1 - part
    return weights[::-1]
