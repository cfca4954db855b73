"""Matching models in the subspaces of their tasks (MaTS): (Σ C_i) θ = Σ C_i θ_i by conjugate gradients from a start.

The metric C_i of a matrix is the identity, the Fisher information, the Gram matrix of its input, or K-FAC's product of that and the
Gram matrix of its output's gradient. Few steps stay near the start. The last two are of matrices in blocks. The first three keep the sums of `regression`; K-FAC needs every
expert at the end.

Invariant: a tensor without statistics is the mean, whatever the start.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from merge_service.errors import TechniqueError
from merge_service.techniques.definition import Evidence, Technique
from merge_service.techniques.families.regression import Map, Regression, from_origin, shrunk, whole
from merge_service.techniques.params import LOGIT_SCALE, SHARING, SUM_SCALE, Param
from merge_service.techniques.place import Array, State
from merge_service.techniques.rule import Facts, Tensor
from merge_service.techniques.scaling import Factor
from merge_service.techniques.shares import factor, share

OUT = ":out"
"""What follows a parameter's name in the name of K-FAC's factor of its output; as of `statistics`, which imports numpy."""


class Matching(Regression):
    """The metrics whose sums stream: identity, fisher and gram."""

    def maps(self, facts: Facts) -> list[Map]:
        if self.params["metric"] in ("identity", "fisher"):
            return [elementwise(facts.numel)]
        linear = facts.linear
        return [] if linear is None or linear.diagonal or facts.layer is None else [whole(linear)]

    def gram(self, tensor: Tensor, order: int, one: Map, moved: Array) -> Array | None:
        if self.params["metric"] == "identity":
            return moved.reshape(-1) * 0 + 1
        found = super().gram(tensor, order, one, moved)
        keeps = found is None or one.diagonal
        return found if keeps else shrunk(found, one.inputs, self.params["off_diagonal"])

    def solved(self, tensor: Tensor, at: Array, moment: Array, gram: Array, count: int) -> Array:
        """The result less the mean, which lies `at` from the base."""
        start, base = self._start(tensor, at, count)
        until = self.params["iterations"], self.params["tolerance"]
        return tensor.solve(by_sums, start, moment, gram, base, until=until) - at

    def _start(self, tensor: Tensor, mean: Array, count: int) -> tuple[Array, Array]:
        """The task vector to start from, and the base in the same shape."""
        factor = {"average": 1.0, "base": 0.0, "task_arithmetic": self.params["scale"] * count}
        base: Any = tensor.base()
        one = self.maps(tensor.facts)[0]
        return mean * factor[self.params["start"]], one.of(base).astype("float64").reshape(mean.shape)


class ByFactors(Matching):
    """K-FAC: q, k and v of attention have one input and three outputs, and are solved one by one."""

    floats = ("mean",)
    streams = False

    def arrays(self, facts: Facts) -> Any:
        return {"mean": (facts.numel, facts.dtype)}

    def wants(self, facts: Facts) -> bool:
        return bool(self.maps(facts))

    def add(self, tensor: Tensor, state: State, order: int) -> None:
        mean, x, part = state["mean"], tensor.whole(order), share(self.params, order, tensor.name)
        state["mean"] = x.copy() if order == 1 or part == 1 else mean - (mean - x) * mean.dtype.type(part)

    def result(self, tensor: Tensor, state: State, count: int) -> Array:
        out, maps = state["mean"].copy(), self.maps(tensor.facts)
        found = (
            [factors(tensor, order, maps[0], self.params["off_diagonal"]) for order in tensor.orders]
            if maps
            else []
        )
        if not found or None in found:
            return out
        one = maps[0]
        start, base = self._start(tensor, one.of(out).astype("float64"), count)
        taus = [one.of(from_origin(tensor, tensor.whole(order))) for order in tensor.orders]
        result = start.copy()
        weights = [factor(self.params, order, tensor.name) for order in tensor.orders]
        for rows, outer, inner in _blocks(found):  # type: ignore[arg-type]
            solve = Kronecker([weight * b for weight, b in zip(weights, outer)], inner)
            moment = solve.summed([tau[rows] for tau in taus])
            steps, tolerance = self.params["iterations"], self.params["tolerance"]
            shift = solve(base[rows])
            limit = tolerance * _norm(moment + shift)
            result[rows] = conjugate(solve, start[rows], moment, steps, limit)
        one.put(out, result)
        return out


@dataclass(frozen=True)
class Kronecker:
    """Σ B_i X A_i."""

    outer: Sequence[Array]
    inner: Sequence[Array]

    def __call__(self, x: Array) -> Array:
        return self.summed([x] * len(self.outer))

    def summed(self, xs: Sequence[Array]) -> Array:
        """Σ B_i X_i A_i."""
        return sum(b @ x @ a for b, x, a in zip(self.outer, xs, self.inner))


def factors(tensor: Tensor, order: int, one: Map, kept: float) -> tuple[Array, Array] | None:
    """K-FAC's two factors of an expert: of the output [parts, rows, rows] and of the input; None if they were not measured."""
    inner, outer = tensor.statistic(order), tensor.statistic(order, OUT)
    if inner is None or outer is None:
        return None
    if outer.ndim == 2:
        outer = outer[None]
    fits = (
        outer.ndim == 3
        and outer.shape[1] == outer.shape[2]
        and outer.shape[0] * outer.shape[1] == one.outputs
    )
    if inner.size != one.inputs**2 or not fits:
        raise TechniqueError(
            f"statistics of {tensor.name}, expert {order}, have shapes {list(inner.shape)} and {list(outer.shape)}, which do not fit a "
            f"map of {one.inputs} to {one.outputs}; measure again"
        )
    return outer, shrunk(inner.reshape(-1), one.inputs, kept).reshape(inner.shape)


def _blocks(found: Sequence[tuple[Array, Array]]) -> Iterator[tuple[slice, list[Array], list[Array]]]:
    count, size, _ = found[0][0].shape
    for at in range(count):
        yield slice(at * size, (at + 1) * size), [b[at] for b, _ in found], [a for _, a in found]


def elementwise(numel: int) -> Map:
    """A tensor of which every element counts on its own."""

    def put(flat: Array, matrix: Array) -> None:
        flat[:] = matrix.reshape(-1)

    return Map(numel, 1, lambda flat: flat.reshape(1, -1), put, diagonal=True)


def by_sums(
    start: Array, moment: Array, gram: Array, base: Array, *, until: tuple[int, float], xp: Any
) -> Array:
    """`conjugate` for X -> X G, `until` steps or a residual relative to the right-hand side for weights, which `base` completes."""

    def apply(x: Array) -> Array:
        return x * gram if gram.ndim == 1 else x @ gram

    return conjugate(apply, start, moment, until[0], until[1] * _norm(moment + apply(base)))


def conjugate(apply: Callable[[Array], Array], start: Array, right: Array, steps: int, limit: float) -> Array:
    """Conjugate gradients for apply(X) = right in the Frobenius inner product, float64, at most `steps` of them.

    Ends at a residual of at most `limit`, of zero, or at a direction without curvature.
    """
    x, residual = start, right - apply(start)
    direction, length = residual, float((residual * residual).sum())
    for _ in range(steps):
        if length == 0 or length**0.5 <= limit:
            break
        image = apply(direction)
        curvature = float((direction * image).sum())
        if curvature <= 0:
            break
        step = length / curvature
        x, residual = x + step * direction, residual - step * image
        before, length = length, float((residual * residual).sum())
        direction = residual + (length / before) * direction
    return x


def _norm(x: Array) -> float:
    return float((x * x).sum()) ** 0.5


def _rule(params: Any) -> Matching:
    return ByFactors(params) if params["metric"] == "kfac" else Matching(params)


_METRICS = ("identity", "fisher", "gram", "kfac")

TECHNIQUES = (
    Technique(
        "mats",
        "(Σ w_i C_i) θ = Σ w_i C_i θ_i by conjugate gradients from a start, C_i: the metric of expert i; without statistics: mean",
        "MaTS, arXiv 2312.04339",
        (
            Param("metric", "choice", "gram", "what is measured of every expert", choices=_METRICS),
            Param(
                "iterations", "int", 100, "steps at most (the authors' 10 for (IA)3, 100 for whole models)", 0
            ),
            Param(
                "start",
                "choice",
                "average",
                "where the iteration begins; few steps stay near it",
                choices=("average", "base", "task_arithmetic"),
            ),
            Param(
                "scale",
                "float",
                SUM_SCALE.default,
                "factor of the sum of task vectors in start: task_arithmetic",
            ),
            Param("off_diagonal", "float", 1.0, "factor of a Gram matrix of inputs off its diagonal", 0, 1),
            Param(
                "tolerance", "float", 1e-5, "residual, relative to the right-hand side, at which it ends", 0
            ),
            *SHARING,
            LOGIT_SCALE,
        ),
        rule=_rule,
        scale=Factor(""),
        portable=False,
        forms=frozenset({"merge", "stream"}),
        evidence=tuple(Evidence(kind, when=("metric", kind)) for kind in _METRICS[1:]),
        keeps="as of regmean; identity and fisher 20 B per weight; kfac: all experts",
        breaks={
            "P1": "has no factor of the task vector; nothing merged is the base",
            "P2": "holds up to rounding",
            "P9": "what no expert moved is fitted with the rest of its matrix",
            "P10": "a fit leaves the hull",
        },
    ),
)
