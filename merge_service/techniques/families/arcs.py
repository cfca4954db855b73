"""Arcs: interpolation between weights (or task vectors) along the sphere, tensor by tensor.

Every result is a linear combination of the experts' tensors, so only their N x N matrix of inner products (Gram matrix) is
needed, in float64. It is of the tensors or of their task vectors; the caller decides, and applies the coefficients to the same.
`weights` are one per expert, not negative, and count relative to their sum; None means equal weights. `xp` is numpy.

None instead of coefficients means the straight line, the weighted mean. It is returned where an arc is undefined: at most one
tensor counts, or all are parallel and antiparallel (to within `ANGLE`), as tensors of one element are. A zero tensor has no
direction; it only shortens the result, as it does in a mean.

Invariant: no threshold has the unit of a weight, so scaled tensors have the same coefficients.
"""

import math
from collections.abc import Sequence
from typing import Any

from merge_service.blocks.questions import Ask, Findings, Grams, Key, Products
from merge_service.errors import TechniqueError
from merge_service.techniques.definition import Technique
from merge_service.techniques.families.averages import Mean
from merge_service.techniques.params import AVERAGING, LOGIT_SCALE, WEIGHT, Param
from merge_service.techniques.place import Array, View
from merge_service.techniques.shares import weights_of

ANGLE = 1e-6
"""Sines up to this are rounding of float32 weights: the arc is then the line between parallel vectors, and noise between others."""
SPACE = Param(
    "space",
    "choice",
    "weights",
    "what is turned: the weights themselves, or (as MergeKit does when it is given a base) their differences from the base",
    choices=("weights", "task_vectors"),
)


class _OnArc(Mean):
    """A mean along arcs: two factors per tensor and expert, computed from the inner products of all experts' tensors."""

    averages = False
    local = True
    straight: tuple[float, ...] = ()
    """Weights of the new model at which no angle is needed."""

    def prepare(self, ask: Ask, view: View, found: Findings) -> Findings:
        if len(view.orders) < 2 or self.params.get("weight") in self.straight:
            return found
        grams = ask(Products())
        assert isinstance(grams, Grams)
        sizes, turns = dict(view.combined), dict[Key, tuple[float, float]]()
        for name, gram in grams.by_tensor.items():
            made = self.turns(name, sizes[name], gram)
            turns |= {(name, order): turn for order, turn in zip(view.orders, made) if turn is not None}
        return found.with_(turns=turns)

    def turns(self, tensor: str, numel: int, gram: Array) -> list[tuple[float, float] | None]:
        """`Place.turn` of every expert for a tensor of `numel` elements; None for a straight line."""
        import numpy as np

        found = self.coefficients(np, tensor, gram, weights_of(self.params, len(gram), tensor))
        if found is None:
            return [None] * len(gram)
        return [(float(order != 0), factor) for order, factor in enumerate(found)]

    def coefficients(self, xp: Any, tensor: str, gram: Array, weights: list[float]) -> list[float] | None:
        """The factor of every expert, None for a straight line."""
        raise NotImplementedError


class Slerp(_OnArc):
    """Slerp of the running and the new model."""

    straight = (0, 1)

    def turns(self, tensor: str, numel: int, gram: Array) -> list[tuple[float, float] | None]:
        (first, dot), (_, second) = gram
        return [None, arc(self.params["weight"], dot, first, second) if numel > 1 else None]


class NuSlerp(_OnArc):
    """Slerp of two vectors as they are."""

    def coefficients(self, xp: Any, tensor: str, gram: Array, weights: list[float]) -> list[float] | None:
        return nuslerp(gram, weights[1], xp=xp)


class MultiSlerp(_OnArc):
    """The direction of the mean of directions."""

    def coefficients(self, xp: Any, tensor: str, gram: Array, weights: list[float]) -> list[float] | None:
        return multislerp(gram, weights, tensor, xp=xp)


class Karcher(_OnArc):
    """The Riemannian mean of directions."""

    def coefficients(self, xp: Any, tensor: str, gram: Array, weights: list[float]) -> list[float] | None:
        iterations, tolerance = self.params["iterations"], self.params["tolerance"]
        return karcher(gram, weights, tensor, iterations, tolerance, xp=xp)


def arc(weight: float, dot: float, first: float, second: float) -> tuple[float, float] | None:
    """The two factors of a slerp of vectors with this inner product and these squared norms; None for a straight line.

    A line is taken where the angle says nothing: norms below 1e-8 or |cos| > 0.9995 (also antipodal and one-element
    tensors). The factors apply to the vectors as they are, so lengths are interpolated too, roughly. Convention of
    MergeKit and TIME's code, with `weight` on the second vector.
    """
    norms = math.sqrt(first), math.sqrt(second)
    if min(norms) < 1e-8:
        return None
    cosine = dot / (norms[0] * norms[1])
    if not abs(cosine) <= 0.9995:
        return None
    angle = math.acos(cosine)
    return math.sin((1 - weight) * angle) / math.sin(angle), math.sin(weight * angle) / math.sin(angle)


def nuslerp(gram: Array, t: float, *, xp: Any) -> list[float] | None:
    """Slerp of two vectors as they are, from the first at t = 0: sin((1 - t) o) / sin o and sin(t o) / sin o, o their angle.

    As MergeKit's nuslerp, which takes t = w_2 / (w_1 + w_2), weights or (with a base) task vectors, and the line below a sine of
    1e-8. For a zero vector MergeKit gives sin(t pi / 2) times the other; here it is the line.
    """
    norms, cosines = _polar(xp, gram)
    if _straight(xp, cosines, norms > 0):
        return None
    angle = math.acos(cosines[0, 1])
    return [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]


def multislerp(gram: Array, weights: Sequence[float] | None, tensor: str, *, xp: Any) -> list[float] | None:
    """The direction of the weighted mean of the unit vectors, with the weighted mean of the norms as its length.

    MergeKit's multislerp continues from there along the exponential map of the mean tangent vector. That vector is the part of
    the same mean across its own direction, so it is zero. Raises `TechniqueError`, naming `tensor`, if the unit vectors cancel
    out.
    """
    return _on_sphere(xp, gram, weights, f"multislerp of {tensor}", (0, 0))


def karcher(
    gram: Array,
    weights: Sequence[float] | None,
    tensor: str,
    iterations: int = 10,
    tolerance: float = 1e-5,
    *,
    xp: Any,
) -> list[float] | None:
    """The weighted Riemannian mean of the unit vectors, with the weighted mean of the norms as its length.

    From the direction m of their mean, m <- exp_m(sum_i w_i log_m(u_i)), at most `iterations` times and until a step is shorter
    than `tolerance` radians, as in MergeKit (whose weights are equal). Raises `TechniqueError`, naming `tensor`, if the unit
    vectors cancel out: no mean is then nearer than others, and MergeKit takes the first expert.
    """
    return _on_sphere(xp, gram, weights, f"karcher of {tensor}", (iterations, tolerance))


def _on_sphere(
    xp: Any, gram: Array, weights: Sequence[float] | None, what: str, steps: tuple[int, float]
) -> list[float] | None:
    """Coefficients of the Riemannian mean, iterated from the direction of the arithmetic mean. `steps`: the most iterations, and
    the least step in radians.
    """
    iterations, tolerance = steps
    norms, cosines = _polar(xp, gram)
    shares = _shares(xp, weights, len(norms))
    drawn = xp.where(norms > 0, shares, 0)
    if _straight(xp, cosines, drawn > 0):
        return None
    drawn /= drawn.sum()
    if _length(drawn, cosines) <= ANGLE:
        raise TechniqueError(
            f"{what}: the directions of the {len(norms)} experts cancel out, so there is no direction between them; "
            "change the weights, or take average"
        )
    mean = drawn / _length(drawn, cosines)
    for _ in range(iterations):
        step = _tangent(xp, mean, drawn, cosines)
        length = _length(step, cosines)
        if length == 0 or length < tolerance:
            break
        mean = math.cos(length) * mean + math.sin(length) / length * step
        mean /= _length(mean, cosines)
    return (mean * (shares @ norms) / xp.where(norms > 0, norms, 1)).tolist()


def _tangent(xp: Any, mean: Array, shares: Array, cosines: Array) -> Array:
    """The weighted mean of the logarithms at `mean`: (o_i / sin o_i) (u_i - cos o_i m). A vector opposite to m has none."""
    along = xp.clip(cosines @ mean, -1, 1)
    across = xp.sqrt(1 - along * along)
    pull = shares * xp.where(across > ANGLE, xp.arccos(along) / xp.maximum(across, ANGLE), 1)
    return pull - (pull @ along) * mean


def _polar(xp: Any, gram: Array) -> tuple[Array, Array]:
    """Norms, and cosines between the vectors; all of a zero vector's are 0."""
    norms = xp.sqrt(xp.diag(gram))
    products = xp.outer(norms, norms)
    cosines = xp.divide(gram, products, out=xp.zeros_like(products), where=products > 0)
    return norms, xp.clip(cosines, -1, 1)


def _shares(xp: Any, weights: Sequence[float] | None, n: int) -> Array:
    given = xp.ones(n) if weights is None else xp.asarray(weights, xp.float64)
    if len(given) != n:
        raise TechniqueError(
            f"weights has {len(given)} entries but there are {n} experts; give one per expert"
        )
    if not given.sum() > 0:
        raise TechniqueError("weights add up to 0; give at least one expert a weight above 0")
    return given / given.sum()


def _straight(xp: Any, cosines: Array, counts: Array) -> bool:
    """Whether the vectors that count are all parallel or antiparallel."""
    inner = cosines[xp.ix_(counts, counts)]
    return bool((1 - inner * inner <= ANGLE**2).all())


def _length(coefficients: Array, cosines: Array) -> float:
    return math.sqrt(max(float(coefficients @ cosines @ coefficients), 0.0))


_PAIR = {
    "P3": "the second checkpoint is the new one",
    "P4": "takes exactly two",
    "P5": "takes exactly two",
}
_NO_STREAM = {"P5": "needs the inner products of all experts"}
_ON_WEIGHTS = dict.fromkeys(
    ("P7", "P8", "P9"), "turns weights, not task vectors, unless space is task_vectors"
)
_ARC = {"P10": "follows the arc, outside the chord"}
_MERGE_FOLD = frozenset({"merge", "fold"})

TECHNIQUES = (
    Technique(
        "slerp",
        "θ = [sin((1-w)Ω) running + sin(wΩ) new] / sin Ω per tensor, cos Ω = <running, new> / (|running| |new|)",
        "Shoemake 1985; as in MergeKit, arXiv 2403.13257, with w on the new model",
        (WEIGHT, LOGIT_SCALE),
        unweighed="it takes two models, and weight says how much the second counts",
        rule=Slerp,
        space="weights",
        forms=_MERGE_FOLD,
        arity=2,
        breaks={
            **_PAIR,
            **dict.fromkeys(("P7", "P8", "P9"), "acts on weights, not on task vectors"),
            **_ARC,
        },
    ),
    Technique(
        "nuslerp",
        "θ = [sin((1-w)Ω) running + sin(wΩ) new] / sin Ω per tensor, of weights or of task vectors; a line where they are parallel",
        "NuSLERP in MergeKit, arXiv 2403.13257",
        (WEIGHT, SPACE, LOGIT_SCALE),
        unweighed="it takes two models, and weight says how much the second counts",
        rule=NuSlerp,
        space="weights",
        forms=_MERGE_FOLD,
        arity=2,
        breaks={**_PAIR, **_ON_WEIGHTS, **_ARC},
    ),
    Technique(
        "multislerp",
        "θ = (Σ w_i |θ_i|) · u, u the direction of Σ w_i θ_i / |θ_i|, per tensor, of weights or of task vectors",
        "MultiSLERP in MergeKit, arXiv 2403.13257",
        (*AVERAGING, SPACE, LOGIT_SCALE),
        rule=MultiSlerp,
        space="weights",
        forms=_MERGE_FOLD,
        breaks={**_NO_STREAM, **_ON_WEIGHTS, **_ARC},
    ),
    Technique(
        "karcher",
        "θ = (Σ w_i |θ_i|) · u, u the Riemannian mean of the directions θ_i / |θ_i| on the sphere, per tensor",
        "Karcher 1977; as in MergeKit, arXiv 2403.13257 (10 iterations, tolerance 1e-5)",
        (
            *AVERAGING,
            Param("iterations", "int", 10, "most steps of the mean on the sphere", 1, 1000),
            Param("tolerance", "float", 1e-5, "radians; a step shorter than this is the last", 0),
            SPACE,
            LOGIT_SCALE,
        ),
        rule=Karcher,
        space="weights",
        forms=_MERGE_FOLD,
        breaks={**_NO_STREAM, **_ON_WEIGHTS, **_ARC},
    ),
)
