"""Projections: singular vectors of what was merged before decide what a new expert may change (OPCM, RAPF).

The arithmetic of one matrix is in functions that take `xp`, numpy or torch. Signs of singular vectors cancel; for equal singular
values the result is not determined, by definition.
"""

from typing import Any

from merge_service.anatomy.packed import Matrix
from merge_service.blocks.singular import cross, frame, left_vectors, rows_of, wide
from merge_service.techniques.definition import Technique
from merge_service.techniques.params import ATTENTION, LOGIT_SCALE, Param
from merge_service.techniques.place import Array, State
from merge_service.techniques.rule import Tensor, TensorRule, summed


class Orthogonal(TensorRule):
    """OPCM: a sum of task vectors, each without its part along the sum so far.

    The published recursion keeps the merged task vector and a factor. Their product is this sum, so only its length is needed at
    the end: the mean of the experts' (`totals`).
    """

    totals = ("norms",)

    def add(self, tensor: Tensor, state: State, order: int) -> None:
        if not tensor.pieces or order == 1:
            super().add(tensor, state, order)
            return
        for piece in tensor.pieces:
            held, tau = summed(state, piece), tensor.matrix(order, piece)
            kept = tensor.solve(opcm_project, held, tau, alpha=self.params["alpha"])
            piece.put(state["sum"][piece.start : piece.stop], held + kept)

    def result(self, tensor: Tensor, state: State, count: int) -> Array:
        return state["sum"].copy()


class FusedMatrices(TensorRule):
    """RAPF: old and new weights mixed in the singular axes of the old; tensors that are no matrices are the new model's."""

    floats = ()

    def add(self, tensor: Tensor, state: State, order: int) -> None:
        pass

    def result(self, tensor: Tensor, state: State, count: int) -> Array:
        running, new = tensor.orders[0], tensor.orders[-1]

        def solve(piece: Matrix) -> Array:
            old, fresh = (tensor.matrix(order, piece) for order in (running, new))
            return tensor.solve(rapf_fuse, old, fresh, b=self.params["floor"])

        if not tensor.pieces:
            return tensor.whole(new).copy()
        return self.by_matrix(tensor, tensor.pieces, solve)


def opcm_project(previous: Array, tau: Array, alpha: float = 0.5, *, xp: Any) -> Array:
    """OPCM (arXiv 2501.09522): the part of `tau` that avoids what was merged before, `previous` = U S V^T; (m, n).

    In P = U^T tau V the diagonal and the leading r x r block are dropped; r counts the singular values whose cumulated sum is at
    most `alpha` of the total. So the result is orthogonal to `previous` and no longer than `tau`. Only the direction of
    `previous` matters, so the sum of projected task vectors serves as well as the merged one. Directions outside its numerical
    rank pass: zeros give `tau` itself (the released code drops the diagonal of tau then). alpha = 1 drops the whole block of the
    numerical rank (the released code then drops 0 or all but one, by rounding).
    """
    if tau.shape[0] < tau.shape[1]:
        return opcm_project(previous.T, tau.T, alpha, xp=xp).T
    values, right = frame(previous, xp)
    if not len(values):
        return tau
    unit = right / values
    seen = cross(previous, tau, xp) @ right
    below = xp.cumsum(xp.flip(values, (0,)), 0)
    block = slice(len(values) - int((below <= alpha * below[-1]).sum()), None)
    back = unit * (unit * seen).sum(0)
    back[:, block] = unit[:, block] @ (unit[:, block].T @ seen[:, block])
    back = back @ right.T
    result = xp.empty_like(tau)
    for rows in rows_of(tau):
        result[rows] = wide(tau[rows], xp) - wide(previous[rows], xp) @ back
    return result


def rapf_fuse(old: Array, new: Array, b: float, *, xp: Any) -> Array:
    """RAPF's parameter fusion (arXiv 2407.14143) of two (m, n) weights; the larger `b` >= 0, the more of the new one.

    With `old` = U S V^T and D = |U^T (new - old)| it is U (M * U^T new + (1 - M) * U^T old), M = min(D / max D + b, 1): the
    largest changes are taken over, small ones are held back. Outside the numerical rank of `old`, and where D = 0 (0/0 in the
    released code, which is for square weights), `new` passes.
    """
    left = left_vectors(old, xp)
    change = left.T @ (wide(new, xp) - wide(old, xp))
    size = abs(change)
    largest = float(size.max()) if len(size) else 0.0
    if not largest:
        return new
    held = xp.clip(1 - b - size / largest, 0, None)
    return xp.asarray(wide(new, xp) - left @ (held * change), dtype=new.dtype)


TECHNIQUES = (
    Technique(
        "opcm",
        "Δ_t ∝ λ Δ_{t-1} + P(τ_t), P drops what lies along the singular vectors of Δ_{t-1}; |Δ_t| = mean_i |τ_i|",
        "OPCM in Merging Models on the Fly Without Retraining, arXiv 2501.09522",
        (
            Param(
                "alpha",
                "float",
                0.5,
                "part of the singular values' sum whose directions are closed to the new expert",
                0,
                1,
            ),
            ATTENTION,
            LOGIT_SCALE,
        ),
        unweighed="experts count by their order, and the result has their mean length",
        rule=Orthogonal,
        portable=False,
        forms=frozenset({"merge", "stream"}),
        ordered=True,
        breaks={
            "P1": "has no factor of the task vector; nothing merged is the base",
            "P2": "what is already there is dropped from a copy",
            "P3": "every expert is projected against those before it",
            "P8": "holds, but singular vectors of equal singular values are not unique",
            "P9": "singular vectors reach where no expert moved",
            "P10": "the length is that of the mean task vector",
        },
    ),
    Technique(
        "rapf",
        "W = U (M ∘ Uᵀ new + (1 - M) ∘ Uᵀ running) per matrix, running = U S Vᵀ, D = |Uᵀ (new - running)|, M = min(D / max D + floor, 1)",
        "RAPF, arXiv 2407.14143",
        (
            Param(
                "floor",
                "float",
                0.6,
                "least share of the new model in every entry (b; the authors' 0.5 to 0.8)",
                0,
            ),
            ATTENTION,
            LOGIT_SCALE,
        ),
        unweighed="floor and the distance of the two models say how much the new one counts",
        rule=FusedMatrices,
        portable=False,
        space="weights",
        forms=frozenset({"merge", "fold"}),
        arity=2,
        breaks={
            "P1": "has no weight of the new model; nothing merged is the base",
            "P3": "the second checkpoint is the new one",
            "P4": "takes exactly two",
            "P5": "takes exactly two",
            "P7": "acts on weights, not on task vectors",
            "P8": "acts on weights, not on task vectors",
            "P9": "acts on weights, not on task vectors",
            "P10": "entries are mixed in rotated axes",
        },
    ),
)
