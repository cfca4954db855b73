"""Leading singular directions of every task vector, made to fit each other (TSV-M), or as constraints on a fold (DOP).

The arithmetic of one matrix is in functions that take `xp`, numpy or torch. Signs of singular vectors cancel; for equal singular
values the result is not determined, by definition.
"""

from dataclasses import replace
from typing import Any

from merge_service.blocks.singular import spectrum, wide
from merge_service.techniques.definition import Technique
from merge_service.techniques.families.spectra import SCOPE
from merge_service.techniques.params import ATTENTION, LOGIT_SCALE, SCALE, WEIGHT, Param
from merge_service.techniques.place import Array, State
from merge_service.techniques.rule import Tensor, TensorRule


class _OfMatrices(TensorRule):
    """A rule for matrices in its scope; other tensors are the mean. Reads the experts at the end."""

    floats = ("mean",)

    def add(self, tensor: Tensor, state: State, order: int) -> None:
        mean, x = state["mean"], tensor.whole(order)
        state["mean"] = x.copy() if order == 1 else mean - (mean - x) * mean.dtype.type(1 / order)

    def result(self, tensor: Tensor, state: State, count: int) -> Array:
        outside = tensor.layer is None and self.params["scope"] == "blocks"
        if outside or not tensor.pieces:
            return state["mean"].copy()

        def solve(piece: Any) -> Array:
            taus = [tensor.matrix(order, piece) for order in tensor.orders]
            return self.solved(tensor, taus, piece.of(state["mean"][piece.start : piece.stop]))

        return self.by_matrix(tensor, tensor.pieces, solve)

    def solved(self, tensor: Tensor, taus: list[Array], mean: Array) -> Array:
        """The result for one matrix."""
        raise NotImplementedError


class TaskSingularVectors(_OfMatrices):
    """TSV-M: every expert has an equal number of directions, which are made orthogonal to those of the others."""

    def solved(self, tensor: Tensor, taus: list[Array], mean: Array) -> Array:
        return tensor.solve(decorrelated, *taus)


class DualProjections(_OfMatrices):
    """DOP: the running model and the new expert, each held to its own weights along its leading directions."""

    def solved(self, tensor: Tensor, taus: list[Array], mean: Array) -> Array:
        return tensor.solve(
            projected, *taus, mean, weight=self.params["weight"], energy=self.params["energy"]
        )


def decorrelated(*taus: Array, xp: Any) -> Array:
    """TSV-M (arXiv 2412.00081) of N task vectors, (m, n) all: polar(U) diag(S) polar(V)^T.

    U, S, V hold the floor(min(m, n) / N) leading singular triplets of each; none if N is above min(m, n). The polar factor is taken
    over singular values above 1e-10 of the largest, so that dependent vectors (equal experts) have one.
    """
    count = min(taus[0].shape) // len(taus)
    if not count:
        return xp.zeros_like(taus[0])
    lefts, values, rights = zip(*(_leading(tau, count, xp) for tau in taus))
    left, right = (_polar(xp.concatenate(side, -1), xp) for side in (lefts, rights))
    return xp.asarray(left * xp.concatenate(values) @ right.T, dtype=taus[0].dtype)


def projected(running: Array, new: Array, mean: Array, *, weight: float, energy: float, xp: Any) -> Array:
    """DOP (NeurIPS 2025) of two task vectors, (m, n): the minimum of Σ w_i (|S_i U_i^T (W - W_i)|^2 + |(W - W_i) V_i S_i|^2).

    That is the Sylvester equation A W + W B = C, solved by eigenvectors of both sides. `weight` is the new expert's. U, S, V of each
    are cut where the cumulated share of singular values reaches `energy` (the one that crosses it is dropped, as released).
    Directions that neither constrains keep `mean`.
    """
    outer, inner, right = 0.0, 0.0, 0.0
    centre = wide(mean, xp)
    for share, tau in ((1 - weight, running), (weight, new)):
        full = wide(tau, xp)
        left, values, across = _leading(tau, min(tau.shape), xp)
        below = xp.cumsum(values, 0) < energy * values.sum()
        left, across = left[:, below] * values[below], across[:, below] * values[below]
        a, b = share * (left @ left.T), share * (across @ across.T)
        outer, inner = outer + a, inner + b
        right = right + a @ (full - centre) + (full - centre) @ b
    (rows, left), (columns, across) = xp.linalg.eigh(outer), xp.linalg.eigh(inner)
    divisor = xp.clip(rows, 0, None)[:, None] + xp.clip(columns, 0, None)[None, :]
    seen = divisor > float(divisor.max()) * max(divisor.shape) * 2.0**-52
    moved = xp.where(seen, left.T @ right @ across / xp.where(seen, divisor, 1), 0)
    return xp.asarray(centre + left @ moved @ across.T, dtype=running.dtype)


def _leading(tau: Array, count: int, xp: Any) -> tuple[Array, Array, Array]:
    """At most `count` leading singular triplets in float64, largest first, within the numerical rank."""
    if tau.shape[0] < tau.shape[1]:
        right, values, left = _leading(tau.T, count, xp)
        return left, values, right
    full = wide(tau, xp)
    values, vectors, rank = spectrum(full.T @ full, tau.shape, xp)
    values, vectors = xp.flip(values, (0,)), xp.flip(vectors, (1,))
    kept = min(count, rank)
    values, vectors = values[:kept], vectors[:, :kept]
    return full @ (vectors / values), values, vectors


def _polar(columns: Array, xp: Any) -> Array:
    """The nearest orthonormal columns, over the numerical rank."""
    left, values, right = xp.linalg.svd(columns, full_matrices=False)
    some = values > 1e-10 * float(values.max()) if len(values) else values > 0
    return left[:, some] @ right[some]


_BREAKS = {
    "P8": "holds, but singular vectors of equal singular values are not unique",
    "P9": "singular vectors reach where no expert moved",
    "P10": "singular vectors are turned against each other",
}
_ALL_MATRICES = "in blocks, or all, tables of tokens and of positions too (as released)"

TECHNIQUES = (
    Technique(
        "tsv_m",
        "θ = θ0 + scale · polar(U) S polar(V)ᵀ per matrix, U S V: the min(m, n) / N leading triplets of every τ_i; other tensors: mean",
        "TSV-Merge in Task Singular Vectors, arXiv 2412.00081",
        (
            replace(SCOPE, doc=f"which matrices: those {_ALL_MATRICES}"),
            replace(SCALE, doc="factor of the merged task vector (alpha)"),
            ATTENTION,
            LOGIT_SCALE,
        ),
        rule=TaskSingularVectors,
        portable=False,
        forms=frozenset({"merge"}),
        breaks={
            **_BREAKS,
            "P2": "N copies of one expert keep its min(m, n) / N leading directions",
            "P5": "how many directions an expert has depends on their number",
        },
    ),
    Technique(
        "dop",
        "min_W Σ w_i (|S_i U_iᵀ (W - W_i)|² + |(W - W_i) V_i S_i|²) per matrix over running and new, τ_i = U_i S_i V_iᵀ; other "
        "tensors: mean of the two",
        "Continual Model Merging without Data: Dual Projections for Balancing Stability and Plasticity, NeurIPS 2025",
        (
            replace(WEIGHT, default=0.2),
            Param(
                "energy",
                "float",
                0.99999,
                "share of the sum of singular values whose directions are held",
                0,
                1,
            ),
            Param(
                "solver",
                "choice",
                "exact",
                "exact: the minimum itself (the released code: 200 steps of Adam)",
                choices=("exact",),
            ),
            replace(SCOPE, doc=f"which matrices: those {_ALL_MATRICES}"),
            ATTENTION,
            LOGIT_SCALE,
        ),
        rule=DualProjections,
        portable=False,
        forms=frozenset({"merge", "fold"}),
        arity=2,
        breaks={
            **_BREAKS,
            "P1": "has no factor of the task vector; nothing merged is the base",
            "P2": "holds up to rounding",
            "P3": "the new expert has its own weight",
            "P4": "takes exactly two",
            "P5": "takes exactly two",
        },
    ),
)
