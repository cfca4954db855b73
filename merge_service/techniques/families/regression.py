"""Regression in the inputs that each expert saw: RegMean, LOT and WUDI, which are one solver.

Per matrix W = W* + Σ w_i (W_i - W*) G_i (Σ w_i G_i)^+: the least squares fit to what every expert computes on its own inputs, of
which G_i is the Gram matrix (WUDI: of the rows of its own task vector). Directions that no expert saw keep the anchor W*.

The state is Σ w G, Σ w (W - W0) G and the mean, in float64. Another anchor needs no other state, because the result is linear in it.
So experts stream, and a fold is the moving average of these sums.

Invariant: a tensor of which some expert has no statistics is the mean.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from merge_service.anatomy.linear import Linear
from merge_service.errors import TechniqueError
from merge_service.techniques.definition import Evidence, Technique
from merge_service.techniques.families.spectra import SCOPE
from merge_service.techniques.params import ATTENTION, AVERAGING, LOGIT_SCALE, SCALE, SHARING, WEIGHT, Param
from merge_service.techniques.place import Array, State
from merge_service.techniques.rule import Facts, Params, Tensor, TensorRule
from merge_service.techniques.shares import is_weighed, parts, share

Function = Callable[..., Any]


@dataclass(frozen=True)
class Map:
    """A matrix [outputs, inputs] in a tensor's elements, and how to write it there; `diagonal`: its Gram matrix is one."""

    inputs: int
    outputs: int
    of: Callable[[Array], Array]
    put: Callable[[Array, Array], None]
    diagonal: bool = False

    @property
    def gram_size(self) -> int:
        """Number of elements of the Gram matrix."""
        return self.inputs if self.diagonal else self.inputs**2

    def gram(self, flat: Array) -> Array:
        """A Gram matrix in its shape."""
        return flat if self.diagonal else flat.reshape(self.inputs, self.inputs)


class Regression(TensorRule):
    """The solver. What differs is which tensors are maps (`maps`), their Gram matrices, and the anchor."""

    floats: tuple[str, ...] = ()
    weighs = True

    def arrays(self, facts: Facts) -> Mapping[str, tuple[int, Any]]:
        found: dict[str, tuple[int, Any]] = {"mean": (facts.numel, facts.dtype)}
        for number, one in enumerate(self.maps(facts)):
            found[f"gram{number}"] = (one.gram_size, "float64")
            found[f"moment{number}"] = (one.inputs * one.outputs, "float64")
            found["measured"] = (1, "uint32")
        return found

    def maps(self, facts: Facts) -> list[Map]:
        """The maps in a tensor; none for a tensor that is only averaged."""
        raise NotImplementedError

    def gram(self, tensor: Tensor, order: int, one: Map, moved: Array) -> Array | None:
        """The Gram matrix of an expert's map, flattened; None if it has no statistics. `moved` is W_i - W0."""
        found = tensor.statistic(order)
        if found is None:
            return None
        if found.size != one.gram_size:
            raise TechniqueError(
                f"statistics of {tensor.name}, expert {order}, have shape {list(found.shape)}; its input has {one.inputs} elements: "
                "measure again"
            )
        return found.reshape(-1)

    def add(self, tensor: Tensor, state: State, order: int) -> None:
        x, part = tensor.whole(order), share(self.params, order, tensor.name)
        mean = state["mean"]
        state["mean"] = x.copy() if order == 1 or part == 1 else mean - (mean - x) * mean.dtype.type(part)
        keep, take = parts(self.params, order, tensor.name)
        for number, one in enumerate(self.maps(tensor.facts)):
            moved = one.of(from_origin(tensor, x))
            gram = self.gram(tensor, order, one, moved)
            if gram is None:
                return
            for role, new in (
                (f"gram{number}", gram),
                (f"moment{number}", tensor.solve(times, moved, one.gram(gram))),
            ):
                state[role] = keep * state[role] + take * new.reshape(-1)
        if "measured" in state:
            state["measured"] += 1

    def result(self, tensor: Tensor, state: State, count: int) -> Array:
        maps = self.maps(tensor.facts)
        if not maps or int(state["measured"][0]) != count:
            return state["mean"].copy()
        anchor = self.anchor(tensor, state["mean"])
        moved, out = from_origin(tensor, anchor), anchor.copy()
        for number, one in enumerate(maps):
            gram, moment = one.gram(state[f"gram{number}"]), state[f"moment{number}"]
            at = one.of(moved)
            found = self.solved(tensor, at, moment.reshape(at.shape), gram, count)
            one.put(out, one.of(anchor) + found.astype(out.dtype))
        return out

    def anchor(self, tensor: Tensor, mean: Array) -> Array:
        """What directions that no expert saw keep."""
        return mean

    def solved(self, tensor: Tensor, at: Array, moment: Array, gram: Array, count: int) -> Array:
        """The result less the anchor, which lies `at` from W0."""
        return tensor.solve(fitted, at, moment, gram)


class RegMean(Regression):
    """Gram matrices are measured; their elements off the diagonal are multiplied by `off_diagonal`."""

    def maps(self, facts: Facts) -> list[Map]:
        linear, everywhere = facts.linear, self.params.get("scope") == "all"
        if linear is None or linear.is_scaling or (facts.layer is None and not everywhere):
            return []
        return [whole(linear)]

    def gram(self, tensor: Tensor, order: int, one: Map, moved: Array) -> Array | None:
        found = super().gram(tensor, order, one, moved)
        return found if found is None or one.diagonal else shrunk(found, one.inputs, self.off_diagonal)

    @property
    def off_diagonal(self) -> float:
        """What is left of the elements off the diagonal."""
        return float(self.params.get("off_diagonal", 1.0))

    def anchor(self, tensor: Tensor, mean: Array) -> Array:
        if self.params.get("anchor") != "base":
            return mean
        base = tensor.base()
        if tensor.moves or base is None:
            return mean * 0
        return base.astype(mean.dtype)


class Lot(RegMean):
    """RegMean anchored at the base, without shrinking; weights of norms are fitted as well."""

    def maps(self, facts: Facts) -> list[Map]:
        if facts.linear is not None and facts.linear.is_scaling:
            return [whole(facts.linear)]
        return super().maps(facts)

    def anchor(self, tensor: Tensor, mean: Array) -> Array:
        return mean * 0


class Wudi(Regression):
    """Every expert's task vector stands for its inputs; nothing is measured."""

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        if params["solver"] == "adam" and is_weighed(params):
            raise TechniqueError(
                "wudi: the steps of solver adam depend on the size of its loss, in which weights have no unit; use solver: exact, or leave "
                "the weights out"
            )

    def maps(self, facts: Facts) -> list[Map]:
        if facts.layer is None and self.params["scope"] == "blocks":
            return []
        return [
            Map(
                piece.shape[1],
                piece.shape[0],
                lambda flat, piece=piece: piece.of(flat[piece.start : piece.stop]),  # type: ignore[misc]
                lambda flat, matrix, piece=piece: piece.put(flat[piece.start : piece.stop], matrix),  # type: ignore[misc]
            )
            for piece in facts.pieces
        ]

    def gram(self, tensor: Tensor, order: int, one: Map, moved: Array) -> Array | None:
        return tensor.solve(own_gram, moved).reshape(-1)

    def anchor(self, tensor: Tensor, mean: Array) -> Array:
        return mean * 0

    def result(self, tensor: Tensor, state: State, count: int) -> Array:
        if self.params["solver"] == "exact":
            return super().result(tensor, state, count)
        out = state["mean"].copy()
        for number, one in enumerate(self.maps(tensor.facts)):
            start = one.of(state["mean"]).astype("float64") * count
            moment = state[f"moment{number}"].reshape(start.shape)
            rate, steps = self.params["learning_rate"], self.params["iterations"]
            gram = one.gram(state[f"gram{number}"])
            one.put(out, tensor.solve(descended, start, moment, gram, rate=rate, steps=steps))
        return out


def whole(linear: Linear) -> Map:
    """The one map that a tensor is."""

    def put(flat: Array, matrix: Array) -> None:
        flat[:] = linear.flat(matrix)

    return Map(linear.inputs, linear.outputs, linear.rows, put, linear.diagonal)


def from_origin(tensor: Tensor, x: Array) -> Array:
    """Weights or a task vector as what lies between them and the base, in float64; without a base, the weights."""
    base = None if tensor.moves else tensor.base()
    return x.astype("float64") if base is None else x.astype("float64") - base


def shrunk(gram: Array, inputs: int, kept: float) -> Array:
    """A flattened Gram matrix whose elements off the diagonal are multiplied by `kept`."""
    out = gram * kept
    out[:: inputs + 1] = gram[:: inputs + 1]
    return out


def times(moved: Array, gram: Array, *, xp: Any) -> Array:
    """A matrix [outputs, inputs] times a Gram matrix, or times a diagonal; float64."""
    return moved * gram if gram.ndim == 1 else moved @ gram


def own_gram(tau: Array, *, xp: Any) -> Array:
    """The Gram matrix of the rows of a task vector over its squared norm, zeros for a task vector of zeros (0/0 as released)."""
    squared = float((tau * tau).sum())
    return tau.T @ tau / squared if squared else xp.zeros((tau.shape[1],) * 2, dtype=tau.dtype)


def fitted(at: Array, moment: Array, gram: Array, *, xp: Any) -> Array:
    """(moment - at · G) G^+ in float64: by Cholesky, or by eigenvalues where G has no full rank.

    A pivot of at most d · eps · trace counts as none, and an eigenvalue of at most d · eps · the largest as zero.
    """
    rest = moment - times(at, gram, xp=xp)
    size, eps = gram.shape[0], 2.0**-52
    if gram.ndim == 1:
        seen = gram > 0
        return xp.where(seen, rest / xp.where(seen, gram, 1), 0)
    factor = _cholesky(gram, float(xp.diag(gram).sum()) * size * eps, xp)
    if factor is not None:
        half = _solve(factor, rest.T, xp, lower=True)
        return _solve(factor.T, half, xp, lower=False).T
    values, vectors = xp.linalg.eigh(gram)
    some = values > size * eps * float(values[-1])
    within = vectors[:, some]
    return (rest @ within / values[some]) @ within.T


def _cholesky(gram: Array, least: float, xp: Any) -> Array | None:
    """The lower factor, None if a pivot is at most `least`."""
    if xp.__name__ == "numpy":
        try:
            factor = xp.linalg.cholesky(gram)
        except xp.linalg.LinAlgError:
            return None
    else:
        factor, failed = xp.linalg.cholesky_ex(gram)
        if int(failed):
            return None
    return factor if float((xp.diag(factor) ** 2).min()) > least else None


def _solve(factor: Array, rest: Array, xp: Any, *, lower: bool) -> Array:
    if xp.__name__ == "numpy":
        from scipy.linalg import solve_triangular

        return solve_triangular(factor, rest, lower=lower, check_finite=False)
    return xp.linalg.solve_triangular(factor, rest, upper=not lower)


def descended(start: Array, moment: Array, gram: Array, *, rate: float, steps: int, xp: Any) -> Array:
    """Adam (.9, .999, 1e-8) on Σ_i |(T - τ_i) τ_i^T|² / |τ_i|², whose gradient is 2 (T Σ G_i - Σ τ_i G_i); from `start`."""
    found, first, second = start, start * 0, start * 0
    for step in range(1, steps + 1):
        gradient = 2 * (found @ gram - moment)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient * gradient
        root = (second / (1 - 0.999**step)) ** 0.5
        found = found - rate * (first / (1 - 0.9**step)) / (root + 1e-8)
    return found


_SCOPE = Param(
    "scope",
    "choice",
    "blocks",
    "which matrices are fitted: those in blocks (as published), or all of which there are statistics (patches, projections, token "
    "table); the others are averaged",
    choices=("blocks", "all"),
)
_OFF_DIAGONAL = Param(
    "off_diagonal",
    "float",
    0.9,
    "factor of a Gram matrix off its diagonal (the authors 0.1 to 1; FusionBench's CLIP 0.95)",
    0,
    1,
)
_GRAM = (Evidence("gram"),)
_SUMS = "4 B per weight; of matrices in blocks 8 B more, and 8 B per element of their Gram matrices"
_RANK = "holds where every direction was seen; others keep the anchor"

TECHNIQUES = (
    Technique(
        "regmean",
        "W = W* + Σ w_i (W_i - W*) G_i (Σ w_i G_i)⁺ per matrix, G_i = E x xᵀ over the inputs of expert i; other tensors: mean",
        "RegMean, arXiv 2212.09849",
        (
            _OFF_DIAGONAL,
            Param(
                "anchor",
                "choice",
                "mean",
                "what directions keep that no expert saw",
                choices=("mean", "base"),
            ),
            _SCOPE,
            *AVERAGING,
            LOGIT_SCALE,
        ),
        rule=RegMean,
        space="weights",
        portable=False,
        evidence=_GRAM,
        resumes=True,
        keeps=_SUMS,
        breaks={
            "P2": "holds up to rounding",
            "P9": "what no expert moved is fitted with the rest of its matrix",
            "P10": "a fit leaves the hull",
        },
    ),
    Technique(
        "regmean_plus",
        "as regmean, block by block: G_i of block l inside expert i, on what the merged blocks below l give; other tensors: mean",
        "RegMean++, arXiv 2508.03121",
        (replace(_OFF_DIAGONAL, default=0.95), *AVERAGING[:3], LOGIT_SCALE),
        rule=RegMean,
        space="weights",
        portable=False,
        forms=frozenset({"merge"}),
        evidence=(Evidence("layer_gram", of="experts"),),
        breaks={
            "P1": "has no factor of the task vector; nothing merged is the base",
            "P2": "holds up to rounding",
            "P5": "what an expert's block sees depends on all experts",
            "P9": "what no expert moved is fitted with the rest of its matrix",
            "P10": "a fit leaves the hull",
        },
    ),
    Technique(
        "lot",
        "W = W0 + Σ w_i τ_i G_i (Σ w_i G_i)⁺ per matrix, and Σ w_i g_i τ_i / Σ w_i g_i for weights of norms; other tensors: mean",
        "LOT Merging, arXiv 2505.23859; formulas from a port",
        (_SCOPE, *AVERAGING, LOGIT_SCALE),
        rule=Lot,
        portable=False,
        evidence=_GRAM,
        resumes=True,
        keeps=_SUMS,
        breaks={
            "P1": "has no factor of the task vector; nothing merged is the base",
            "P2": "holds up to rounding",
            "P9": "what no expert moved is fitted with the rest of its matrix",
            "P10": "a fit leaves the hull",
        },
    ),
    Technique(
        "wudi",
        "θ = θ0 + scale · T, T = Σ w_i τ_i G_i (Σ w_i G_i)⁺ per matrix, G_i = τ_iᵀ τ_i / |τ_i|²; other tensors: mean",
        "WUDI-Merging, arXiv 2503.08099",
        (
            Param(
                "solver",
                "choice",
                "exact",
                "exact: the minimum itself; adam: the released iteration, whose steps depend on the size of task vectors",
                choices=("exact", "adam"),
            ),
            Param(
                "iterations",
                "int",
                300,
                "steps of adam (300 in the released function, 400 in its configuration)",
                0,
            ),
            Param("learning_rate", "float", 1e-5, "of adam", 0),
            replace(
                SCOPE,
                doc="which matrices: those in blocks, or all, tables of tokens and of positions too (as released)",
            ),
            SCALE,
            *SHARING,
            replace(WEIGHT, forms=frozenset({"fold"})),
            ATTENTION,
            LOGIT_SCALE,
        ),
        rule=Wudi,
        portable=False,
        resumes=True,
        keeps=_SUMS,
        breaks={
            "P2": "adam stops before the minimum; exact holds up to rank",
            "P9": "what no expert moved is fitted with the rest of its matrix",
            "P10": "a fit leaves the hull",
        },
    ),
)
