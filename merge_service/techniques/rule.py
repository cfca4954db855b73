"""What a rule is: how it combines experts, in a span or in a whole tensor, and which statistics it needs first.

A rule is created from a technique's parameters. It keeps a state of a few arrays, takes one expert at a time in canonical order,
and turns the state into weights or a task vector. A merge of N experts IS `add` N times and then `result`, so streaming equals
batch bit for bit.

No rule sees a file, a thread, a device or the rest of the model. `xp` is numpy, or torch if blocks lie on a device; only what
both have is used. No module of rules imports numpy at import: studies and the command line read the techniques' rows.

Two expressions keep the sign of a zero, because an untouched weight must come out bit-equal: subtracting (m - x) instead of
adding (x - m), and adding a task vector as base - (0 - tau). -0.0 + 0.0 is 0.0, but -0.0 - 0.0 is -0.0.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from merge_service.anatomy.linear import Linear
from merge_service.anatomy.packed import Matrix
from merge_service.blocks.questions import Ask, Findings, Thresholds
from merge_service.techniques.place import Array, Election, Place, State, View

Params = Mapping[str, Any]
Blocks = Sequence[Array]
Places = Sequence[Place]


class Combining:
    """Properties of rules of both kinds.

    `floats`, `doubles` (float64) and `words` (uint32) name the state's arrays, which start at zero. `kernel` is the fused loop that does the same,
    None if there is none. `whole`: tensors are computed whole, not span by span. `local`: what `prepare` computes for tensors that
    share thresholds depends on no others. `averages`: the rule is already a mean of weights, so running statistics need no other
    rule. `adds`: task vectors are summed, not averaged. `masks_scalars`: random draws also apply to tensors of one number without
    a shape. `weighs`: experts have weights of a mean (`Place.share`). `measured`: blocks come with what was measured of the expert in them. `learned`: with learned factors of the expert.
    `streams`: false for parameters with which a technique that streams does not.
    """

    floats: tuple[str, ...] = ()
    doubles: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    kernel: str | None = None
    whole = False
    local = False
    averages = False
    adds = False
    masks_scalars = False
    weighs = False
    measured = False
    learned = False
    streams = True

    def __init__(self, params: Params) -> None:
        self.params = params

    def prepare(self, ask: Ask, view: View, found: Findings) -> Findings:
        """`found`, and the statistics of whole tensors that this rule needs."""
        return found


class Rule(Combining):
    """How experts are combined in a span.

    A rule whose state allows an expert to be taken out again has a method `remove` like `add`; its `share` is the expert's weight
    over that of the remaining ones.
    """

    def add(self, xp: Any, state: State, x: Array, place: Place) -> None:
        """Add one expert's block (weights, or a thinned-out task vector) to the state; `x` is not changed."""
        raise NotImplementedError

    def result(self, xp: Any, state: State, majority: int) -> tuple[Array, Election]:
        """The combined block. `majority` is the sign for elements whose vote is a tie."""
        raise NotImplementedError

    def result_at(self, xp: Any, state: State, majority: int, place: Place) -> tuple[Array, Election]:
        """The same for a rule that must know the `place` of the newest expert's block."""
        return self.result(xp, state, majority)


class Together(Rule):
    """A rule that needs the blocks of all experts at once: they are collected, and nothing is computed before the end.

    It must be elementwise, so that blocks may be cut anywhere.
    """

    def add(self, xp: Any, state: State, x: Array, place: Place) -> None:
        state.setdefault("blocks", []).append(x)
        state.setdefault("places", []).append(place)

    def result(self, xp: Any, state: State, majority: int) -> tuple[Array, Election]:
        out = self.combined(xp, state["blocks"], state["places"])
        return xp.asarray(out, dtype=state["blocks"][0].dtype), Election()

    def combined(self, xp: Any, blocks: Blocks, places: Places) -> Array:
        """The experts' blocks, in their order, combined."""
        raise NotImplementedError


@dataclass(frozen=True)
class Facts:
    """What a tensor is: its name and size, the type of sums, the number of its block (None outside blocks), the map of inputs that it
    is (None if it is none), and its matrices.
    """

    name: str
    numel: int
    dtype: Any
    layer: int | None = None
    linear: Linear | None = None
    pieces: tuple[Matrix, ...] = ()


class Tensor(Protocol):
    """One tensor of a merge, as a rule uses it; experts are identified by their numbers, from 1.

    `pieces` are its matrices; none for a tensor that is no matrix. `layer` is the number of its block, None outside of blocks.
    """

    name: str
    numel: int
    dtype: Any
    params: Params
    pieces: Sequence[Matrix]
    layer: int | None
    orders: Sequence[int]
    facts: Facts
    moves: bool

    def base(self) -> Array | None:
        """The base's numbers, None for a merge without a base."""

    def statistic(self, order: int, suffix: str = "") -> Array | None:
        """What was measured of an expert's tensor, float64 in the statistic's own shape; None where nothing was."""

    def factors(self) -> Array | None:
        """Learned coefficients of the tensor, float64 [N] or [N, columns]; None where there are none."""

    def statistics_norm(self, order: int) -> float:
        """The L2 norm of all statistics of an expert, over the whole model."""

    def thresholds(self, order: int) -> Thresholds:
        """The thresholds of the tensor's group in an expert, as found in `prepare`; everything where none were looked for."""

    def blocks(self, order: int) -> Iterator[tuple[slice, Array]]:
        """An expert's task vector (its weights, if those are merged), block by block."""

    def whole(self, order: int) -> Array:
        """The same in one array."""

    def matrix(self, order: int, piece: Matrix) -> Array:
        """One matrix of the same."""

    def empty(self) -> Array:
        """An array of the tensor's size and type, not filled."""

    def solve(self, function: Callable[..., Any], *matrices: Array, **options: Any) -> Array:
        """Call a function of matrices that takes `xp`, on the host or the device."""

    def put(self, matrix: Array) -> Any:
        """A matrix in block storage, on the host or the device."""

    def squared(self, values: Iterable[Array]) -> float:
        """The squared norm of a vector given in blocks of whole grains."""

    def cut(self, array: Array) -> Sequence[Array]:
        """An array of the tensor's size in such blocks."""


class TensorRule(Combining):
    """How experts are combined in one tensor that the rule needs whole: singular vectors, or a factor that depends on all
    elements.

    `floats` names arrays of the tensor's size, `tallies` numbers per tensor, `totals` numbers of the whole model. All of them are
    the streaming state and start at zero. Sums over a tensor are computed by `Tensor.squared`, so that they do not depend on
    threads.
    """

    whole = True
    floats: tuple[str, ...] = ("sum",)
    tallies: tuple[str, ...] = ()
    totals: tuple[str, ...] = ()

    def arrays(self, facts: Facts) -> Mapping[str, tuple[int, Any]]:
        """Size and type of every array of a tensor's state."""
        arrays = dict.fromkeys(self.floats, (facts.numel, facts.dtype))
        return {**arrays, **dict.fromkeys(self.tallies, (1, "uint32"))}

    def wants(self, facts: Facts) -> bool:
        """Whether statistics of the tensor are used, where a technique uses any."""
        return "measured" in self.arrays(facts)

    def add(self, tensor: Tensor, state: State, order: int) -> None:
        """Add one expert's task vector to the state of a tensor, in place."""
        for where, tau in tensor.blocks(order):
            state["sum"][where] += tau

    def result(self, tensor: Tensor, state: State, count: int) -> Array:
        """The result for `count` experts: a task vector (weights, if those are merged), flattened."""
        raise NotImplementedError

    def by_matrix(self, tensor: Tensor, pieces: Sequence[Matrix], solve: Callable[[Matrix], Array]) -> Array:
        """The tensor whose matrices (at least one) are the results of `solve`."""
        out = tensor.empty()
        for piece in pieces:
            piece.put(out[piece.start : piece.stop], solve(piece))
        return out


def summed(state: State, piece: Matrix) -> Array:
    """A matrix of the sum so far."""
    return piece.of(state["sum"][piece.start : piece.stop])


def widened(xp: Any, blocks: Blocks) -> Iterator[Array]:
    """Blocks in float64, one after the other."""
    return (xp.asarray(block, dtype=xp.float64) for block in blocks)


def total(xp: Any, blocks: Blocks) -> Array:
    """The sum of blocks in float64, in their order."""
    return sum(widened(xp, blocks))
