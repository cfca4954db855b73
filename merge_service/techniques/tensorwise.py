"""Rules that must see a tensor whole: singular vectors, or a factor that depends on all of its elements.

A rule adds one expert at a time to the state of one tensor and turns it into what is merged; matrices are handed to
`matrices.py`, everything that is no matrix is averaged or summed.

Invariant: sums over a tensor are taken as everywhere (`Tensor.squared`), so results do not depend on threads.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from merge_service.anatomy.packed import Matrix
from merge_service.techniques.matrices import isotropic, isotropic_task_specific, opcm_project, rapf_fuse
from merge_service.techniques.place import State
from merge_service.techniques.rule import Combining
from merge_service.techniques.spherical import mean_cosine, model_stock

Array = np.ndarray


class Tensor(Protocol):
    """One tensor of a merge, as a rule sees it; experts are known by their numbers, from 1.

    `pieces` says where its matrices lie; none in what is no matrix.
    """

    name: str
    numel: int
    dtype: np.dtype
    params: Mapping[str, Any]
    pieces: Sequence[Matrix]
    orders: Sequence[int]

    def blocks(self, order: int) -> Iterator[tuple[slice, Array]]:
        """An expert's task vector (its weights, if those are merged), block by block."""

    def whole(self, order: int) -> Array:
        """The same in one array."""

    def matrix(self, order: int, piece: Matrix) -> Array:
        """One matrix of the same."""

    def solve(self, function: Callable[..., Any], *matrices: Array, **options: Any) -> Array:
        """A function of `matrices.py`, where blocks are worked on."""

    def put(self, matrix: Array) -> Any:
        """A matrix where blocks are worked on."""

    def squared(self, values: Iterable[Array]) -> float:
        """The squared norm of a vector given in blocks of whole grains."""

    def cut(self, array: Array) -> Sequence[Array]:
        """An array of the tensor's size in such blocks."""


class TensorRule(Combining):
    """How experts come together in one tensor.

    `floats` names arrays of the tensor's size, `tallies` numbers per tensor, `totals` numbers of the whole model, all of
    which are the streaming state and start at zero.
    """

    whole = True
    floats: tuple[str, ...] = ("sum",)
    tallies: tuple[str, ...] = ()
    totals: tuple[str, ...] = ()

    def add(self, tensor: Tensor, state: State, order: int) -> None:
        """Take one expert into the state of a tensor, in place: its task vector is added up."""
        for where, tau in tensor.blocks(order):
            state["sum"][where] += tau

    def result(self, tensor: Tensor, state: State, count: int) -> Array:
        """What `count` experts come to: a task vector (weights, if those are merged), flattened."""
        raise NotImplementedError

    def _by_matrix(
        self, tensor: Tensor, otherwise: Callable[[], Array], solve: Callable[[Matrix], Array]
    ) -> Array:
        if not tensor.pieces:
            return otherwise()
        out = np.empty(tensor.numel, tensor.dtype)
        for piece in tensor.pieces:
            piece.put(out[piece.start : piece.stop], solve(piece))
        return out


class Isotropic(TensorRule):
    """Iso-C: the summed matrix with all singular values made equal; the mean where there is no matrix."""

    def result(self, tensor: Tensor, state: State, count: int) -> Array:
        def solve(piece: Matrix) -> Array:
            return tensor.solve(isotropic, _held(state, piece))

        return self._by_matrix(tensor, lambda: state["sum"] / tensor.dtype.type(count), solve)


class IsotropicTasks(TensorRule):
    """Iso-CTS: as Iso-C, with directions of every expert's own; reads the experts a second time."""

    def result(self, tensor: Tensor, state: State, count: int) -> Array:
        def solve(piece: Matrix) -> Array:
            taus = (tensor.put(tensor.matrix(order, piece)) for order in tensor.orders)
            fraction = tensor.params["common_fraction"]
            return tensor.solve(
                isotropic_task_specific, _held(state, piece), taus=taus, count=count, common_fraction=fraction
            )

        return self._by_matrix(tensor, lambda: state["sum"] / tensor.dtype.type(count), solve)


class Orthogonal(TensorRule):
    """OPCM: a sum of task vectors, each without what lies along the sum so far.

    The published recursion keeps the merged task vector and a factor; their product is this sum, so only the length needs
    to be known at the end: the mean of the experts' (`totals`).
    """

    totals = ("norms",)

    def add(self, tensor: Tensor, state: State, order: int) -> None:
        if not tensor.pieces or order == 1:
            super().add(tensor, state, order)
            return
        for piece in tensor.pieces:
            held, tau = _held(state, piece), tensor.matrix(order, piece)
            kept = tensor.solve(opcm_project, held, tau, alpha=tensor.params["alpha"])
            piece.put(state["sum"][piece.start : piece.stop], held + kept)

    def result(self, tensor: Tensor, state: State, count: int) -> Array:
        return state["sum"].copy()


class Stock(TensorRule):
    """Model Stock: the mean task vector, as far out as the experts agree on its direction."""

    floats = ("mean", "unit")
    tallies = ("zeros",)

    def add(self, tensor: Tensor, state: State, order: int) -> None:
        norm = math.sqrt(tensor.squared(tau for _, tau in tensor.blocks(order)))
        if norm == 0:
            state["zeros"] += 1
        for where, tau in tensor.blocks(order):
            mean = state["mean"][where]
            state["mean"][where] = mean - (mean - tau) * (1 / order)
            if norm:
                state["unit"][where] += tau * (1 / norm)

    def result(self, tensor: Tensor, state: State, count: int) -> Array:
        cosine = mean_cosine(tensor.squared(tensor.cut(state["unit"])), count, int(state["zeros"][0]))
        return state["mean"] * model_stock(cosine, count, tensor.name, raw=tensor.params["ratio"] == "raw")


class FusedMatrices(TensorRule):
    """RAPF: old and new mixed in the axes of the old; what is no matrix is the new one's."""

    floats = ()

    def add(self, tensor: Tensor, state: State, order: int) -> None:
        pass

    def result(self, tensor: Tensor, state: State, count: int) -> Array:
        running, new = tensor.orders[0], tensor.orders[-1]

        def solve(piece: Matrix) -> Array:
            old, fresh = (tensor.matrix(order, piece) for order in (running, new))
            return tensor.solve(rapf_fuse, old, fresh, b=tensor.params["floor"])

        return self._by_matrix(tensor, lambda: tensor.whole(new).copy(), solve)


def _held(state: State, piece: Matrix) -> Array:
    """A matrix of the sum so far."""
    return piece.of(state["sum"][piece.start : piece.stop])
