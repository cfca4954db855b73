"""Leading singular directions of every task vector, made to fit each other (TSV-M), or as constraints on a fold (DOP, NUFILT).

The arithmetic of one matrix is in functions that take `xp`, numpy or torch. Signs of singular vectors cancel; for equal singular
values the result is not determined, by definition.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from merge_service.blocks.singular import spectrum, wide
from merge_service.techniques.definition import Technique
from merge_service.techniques.families.spectra import SCOPE
from merge_service.techniques.params import ATTENTION, LOGIT_SCALE, SCALE, WEIGHT, Param
from merge_service.techniques.place import Array, State
from merge_service.techniques.rule import Params, Tensor, TensorRule


class OfMatrices(TensorRule):
    """A rule for matrices in its scope; other tensors are the mean. Reads the experts at the end."""

    floats = ("mean",)

    def add(self, tensor: Tensor, state: State, order: int) -> None:
        mean, x = state["mean"], tensor.whole(order)
        state["mean"] = x.copy() if order == 1 else mean - (mean - x) * mean.dtype.type(1 / order)

    def result(self, tensor: Tensor, state: State, count: int) -> Array:
        if not is_solved(tensor):
            return state["mean"].copy()

        def solve(piece: Any) -> Array:
            taus = [tensor.matrix(order, piece) for order in tensor.orders]
            return self.solved(tensor, taus, piece.of(state["mean"][piece.start : piece.stop]))

        return self.by_matrix(tensor, tensor.pieces, solve)

    def solved(self, tensor: Tensor, taus: list[Array], mean: Array) -> Array:
        """The result for one matrix."""
        raise NotImplementedError


def is_solved(tensor: Tensor) -> bool:
    """Whether a tensor consists of matrices in scope."""
    return bool(tensor.pieces) and (tensor.layer is not None or tensor.params["scope"] != "blocks")


class TaskSingularVectors(OfMatrices):
    """TSV-M: every expert has an equal number of directions, which are made orthogonal to those of the others."""

    def solved(self, tensor: Tensor, taus: list[Array], mean: Array) -> Array:
        return tensor.solve(decorrelated, *taus)


class DualProjections(OfMatrices):
    """DOP: the running model and the new expert, each held to its own weights along its leading directions."""

    def solved(self, tensor: Tensor, taus: list[Array], mean: Array) -> Array:
        return tensor.solve(projected, *taus, mean, params=self.params)


class NullSpaceFilter(TensorRule):
    """NUFILT: the running model and the new task vector without what would change the running one; other tensors are the running
    model's.
    """

    floats = ()

    def add(self, tensor: Tensor, state: State, order: int) -> None:
        tensor.whole(order)  # numbers that are not finite are found where they have no effect too

    def result(self, tensor: Tensor, state: State, count: int) -> Array:
        running, new = tensor.orders[0], tensor.orders[-1]
        if not is_solved(tensor):
            return tensor.whole(running).copy()

        def solve(piece: Any) -> Array:
            taus = [tensor.matrix(order, piece) for order in (running, new)]
            start = _drawn(f"{tensor.name}:{piece.start}", (self.params["rank"], taus[0].shape[1]))
            return tensor.solve(filtered, *taus, tensor.put(start), params=self.params)

        return self.by_matrix(tensor, tensor.pieces, solve)


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


def projected(running: Array, new: Array, mean: Array, *, params: Params, xp: Any) -> Array:
    """DOP (NeurIPS 2025) of two task vectors, (m, n): the minimum of Σ w_i (|S_i U_i^T (W - W_i)|^2 + |(W - W_i) V_i S_i|^2).

    `weight` is the new expert's. U, S, V of each are cut where the cumulated share of singular values reaches `energy` (the one that
    crosses it is dropped, as released); `directions` leaves only the terms with U (left) or V (right). Directions that neither expert
    constrains keep `mean`. As released it is `iterations` steps of Adam from the mean instead, `solver` adam with these weights and
    mgda with weights that move (`_descended`).
    """
    held = [_Hold.of(tau, params, xp) for tau in (running, new)]
    weights, centre = (1 - params["weight"], params["weight"]), wide(mean, xp)
    find = _balanced if params["solver"] == "exact" else _descended
    return xp.asarray(find(centre, held, weights, params, xp=xp), dtype=running.dtype)


def filtered(running: Array, new: Array, start: Array, *, params: Params, xp: Any) -> Array:
    """NUFILT (arXiv 2509.21413) of two task vectors P and T, (m, n): P + T (I - V V^T) + T C.

    V holds the `kept` leading right singular vectors of P, U the `own` leading ones of T. C makes the result act as T on U and as P
    on V: the least squares fit, of least size (`exact`), or C = B A of `rank` after so many steps of Adam from B = 0, A = `start`
    (`adam`, as released).
    """
    before, own = (_leading(tau, params[key], xp)[2] for tau, key in ((running, "kept"), (new, "own")))
    old, fresh = wide(running, xp), wide(new, xp)
    passed = old + fresh - fresh @ before @ before.T
    seen = xp.concatenate([own, before], -1)
    lacking = xp.concatenate([(fresh - passed) @ own, (old - passed) @ before], -1)
    if params["solver"] == "exact":
        left = _leading(new, min(new.shape), xp)[0]
        more = left @ (left.T @ lacking @ _inverse(seen, xp))
    else:
        more = fresh @ _adapted(fresh, seen, lacking, wide(start, xp), params, xp)
    return xp.asarray(passed + more, dtype=running.dtype)


def _adapted(tau: Array, seen: Array, lacking: Array, a: Array, params: Params, xp: Any) -> Array:
    """B A after Adam (.9, .999, 1e-8) on |lacking - tau B A seen|^2."""
    found = [a.T * 0, a]
    first, second = ([one * 0 for one in found] for _ in range(2))
    for step in range(1, params["iterations"] + 1):
        b, a = found
        apart = 2 * tau.T @ (tau @ b @ (a @ seen) - lacking)
        for at, gradient in enumerate((apart @ (a @ seen).T, b.T @ apart @ seen.T)):
            first[at] = 0.9 * first[at] + 0.1 * gradient
            second[at] = 0.999 * second[at] + 0.001 * gradient * gradient
            root = (second[at] / (1 - 0.999**step)) ** 0.5
            found[at] = found[at] - params["learning_rate"] * (first[at] / (1 - 0.9**step)) / (root + 1e-8)
    return found[0] @ found[1]


def _drawn(name: str, shape: tuple[int, int]) -> Array:
    """Normal numbers of size .02 that depend on the name alone."""
    import zlib

    import numpy as np

    return np.random.default_rng(zlib.crc32(name.encode())).normal(0, 0.02, shape)


def _inverse(columns: Array, xp: Any) -> Array:
    """The pseudoinverse, over singular values above 1e-10 of the largest."""
    left, values, right = xp.linalg.svd(columns, full_matrices=False)
    some = values > 1e-10 * float(values.max()) if len(values) else values > 0
    return (right[some].T / values[some]) @ left[:, some].T


@dataclass(frozen=True)
class _Hold:
    """What holds the result to one model: |S U^T (W - target)|^2 + |(W - target) V S|^2, with A = U S^2 U^T and B = V S^2 V^T."""

    target: Array
    a: Array
    b: Array

    @classmethod
    def of(cls, tau: Array, params: Params, xp: Any) -> "_Hold":
        """Of a task vector, along its directions."""
        which = params["directions"]
        left, values, across = _leading(tau, min(tau.shape), xp)
        below = xp.cumsum(values, 0) < params["energy"] * values.sum()
        left, across = left[:, below] * values[below], across[:, below] * values[below]
        return cls(wide(tau, xp), left @ left.T * (which != "right"), across @ across.T * (which != "left"))

    def pull(self, at: Array) -> Array:
        """Half the gradient at `at`."""
        apart = at - self.target
        return self.a @ apart + apart @ self.b


def _balanced(
    centre: Array, held: Sequence[_Hold], weights: Sequence[float], params: Params, *, xp: Any
) -> Array:
    """The minimum: the Sylvester equation A W + W B = C, by eigenvectors of both sides."""
    right = -sum(weight * one.pull(centre) for weight, one in zip(weights, held))
    outer, inner = (
        sum(weight * side for weight, side in zip(weights, sides))
        for sides in zip(*((one.a, one.b) for one in held))
    )
    (rows, left), (columns, across) = xp.linalg.eigh(outer), xp.linalg.eigh(inner)
    divisor = xp.clip(rows, 0, None)[:, None] + xp.clip(columns, 0, None)[None, :]
    seen = divisor > float(divisor.max()) * max(divisor.shape) * 2.0**-52
    moved = xp.where(seen, left.T @ right @ across / xp.where(seen, divisor, 1), 0)
    return centre + left @ moved @ across.T


def _descended(
    centre: Array, held: Sequence[_Hold], weights: Sequence[float], params: Params, *, xp: Any
) -> Array:
    """Adam (.9, .999, 1e-8) as released. With mgda the weights move by 1 - .999 at every step, towards those for which the two
    gradients, each divided by its loss, sum to the shortest vector.
    """
    found, first, second = centre, centre * 0, centre * 0
    for step in range(1, params["iterations"] + 1):
        pulls = [2 * one.pull(found) for one in held]
        if params["solver"] == "mgda":
            shortest = _shortest(found, held, pulls)
            weights = [0.999 * weight + 0.001 * other for weight, other in zip(weights, shortest)]
        gradient = sum(weight * pull for weight, pull in zip(weights, pulls))
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient * gradient
        root = (second / (1 - 0.999**step)) ** 0.5
        found = found - params["learning_rate"] * (first / (1 - 0.9**step)) / (root + 1e-8)
    return found


def _shortest(at: Array, held: Sequence[_Hold], pulls: Sequence[Array]) -> tuple[float, float]:
    """The weights, from .001 to .999 and with sum 1, of two gradients over their losses whose sum is shortest."""
    losses = [float(((at - one.target) * pull).sum()) / 2 for one, pull in zip(held, pulls)]
    one, two = (pull / (loss or 1.0) for pull, loss in zip(pulls, losses))
    squares, product = (float((one * one).sum()), float((two * two).sum())), float((one * two).sum())
    if product >= squares[0]:
        return 0.999, 0.001
    if product >= squares[1]:
        return 0.001, 0.999
    share = (squares[1] - product) / (squares[0] + squares[1] - 2 * product)
    return share, 1 - share


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


BREAKS = {
    "P8": "holds, but singular vectors of equal singular values are not unique",
    "P9": "singular vectors reach where no expert moved",
    "P10": "singular vectors are turned against each other",
}
_BREAKS_OF_TWO = {
    **BREAKS,
    "P1": "has no factor of the task vector; nothing merged is the base",
    "P2": "holds up to rounding",
    "P4": "takes exactly two",
    "P5": "takes exactly two",
}
ALL_MATRICES = "in blocks, or all, tables of tokens and of positions too (as released)"

TECHNIQUES = (
    Technique(
        "tsv_m",
        "θ = θ0 + scale · polar(U) S polar(V)ᵀ per matrix, U S V: the min(m, n) / N leading triplets of every τ_i; other tensors: mean",
        "TSV-Merge in Task Singular Vectors, arXiv 2412.00081",
        (
            replace(SCOPE, doc=f"which matrices: those {ALL_MATRICES}"),
            replace(SCALE, doc="factor of the merged task vector (alpha)"),
            ATTENTION,
            LOGIT_SCALE,
        ),
        unweighed="every expert has the same number of directions",
        rule=TaskSingularVectors,
        portable=False,
        forms=frozenset({"merge"}),
        breaks={
            **BREAKS,
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
                "exact: the minimum itself; mgda: the released iteration, with weights that move; adam: with fixed ones",
                choices=("exact", "adam", "mgda"),
            ),
            Param("iterations", "int", 200, "steps of adam and mgda", 0),
            Param("learning_rate", "float", 1e-4, "of adam and mgda", 0),
            Param(
                "directions",
                "choice",
                "both",
                "along which directions of a matrix the two are held: of outputs (left), of inputs (right), or both",
                choices=("both", "left", "right"),
            ),
            replace(SCOPE, doc=f"which matrices: those {ALL_MATRICES}"),
            ATTENTION,
            LOGIT_SCALE,
        ),
        unweighed="it takes a running model and a new one, and weight says how much the new one counts",
        rule=DualProjections,
        portable=False,
        forms=frozenset({"merge", "fold"}),
        arity=2,
        breaks={**_BREAKS_OF_TWO, "P3": "the new expert has its own weight"},
    ),
    Technique(
        "nufilt",
        "W = running + τ (I - V Vᵀ) + τ C per matrix, V: leading right singular vectors of running - θ0, C: the result acts as τ on its "
        "own leading ones, as running on V; other tensors: running",
        "Null-Space Filtering for Data-Free Continual Model Merging (NUFILT), arXiv 2509.21413",
        (
            Param(
                "kept",
                "int",
                128,
                "directions of the running model's inputs that the new expert may not change",
                0,
            ),
            Param(
                "own",
                "int",
                8,
                "directions of the new expert's inputs on which the result acts as it does",
                0,
            ),
            Param(
                "solver",
                "choice",
                "exact",
                "exact: the least squares fit; adam: a product of low rank after some steps, as released",
                choices=("exact", "adam"),
            ),
            Param("rank", "int", 64, "of the product (adam)", 1),
            Param("iterations", "int", 50, "steps of adam", 0),
            Param("learning_rate", "float", 1e-3, "of adam", 0),
            replace(
                SCOPE,
                doc="which matrices: those in blocks, or all, tables too (released: those of attention and the first of an MLP)",
            ),
            ATTENTION,
            LOGIT_SCALE,
        ),
        unweighed="it takes a running model and a new one; kept and own say how much the new one counts",
        rule=NullSpaceFilter,
        portable=False,
        forms=frozenset({"merge", "fold"}),
        arity=2,
        breaks={**_BREAKS_OF_TWO, "P3": "the second checkpoint is the new one"},
    ),
)
