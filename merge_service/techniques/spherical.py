"""Coefficients of merges along arcs: every result is a linear combination of the experts' tensors.

Invariant: the N x N matrix of inner products (Gram matrix), in float64, is all that is looked at. It is of the tensors or
of their task vectors; the caller decides, and applies the coefficients to the same. `weights` are one per expert, not
negative, and count relative to their sum; None means equal ones.

None instead of coefficients says: take the straight line, the weighted mean. So it is where an arc means nothing: at most
one tensor that counts, or only parallel and antiparallel ones (to within `ANGLE`), as tensors of one element are. A zero
tensor has no direction; it only shortens the result, as it does in a mean. No threshold has the unit of a weight, so
scaled tensors have the same coefficients.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from merge_service.blocks.questions import Ask, Findings, Grams, Key, Products
from merge_service.errors import TechniqueError
from merge_service.techniques.place import View
from merge_service.techniques.rules import Mean
from merge_service.techniques.shares import share

Array = np.ndarray
ANGLE = 1e-6
"""Sines up to this are rounding of float32 weights: between parallel ones the arc is the line, between others noise."""


class _OnArc(Mean):
    """A mean along arcs: two factors per tensor and expert, made of the inner products of all experts' tensors."""

    averages = False

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

    straight: tuple[float, ...] = ()
    """Weights of the new model at which no angle is needed."""

    def turns(self, tensor: str, numel: int, gram: Array) -> list[tuple[float, float] | None]:
        """`Place.turn` of every expert in a tensor of `numel` elements; None for a straight line."""
        found = self.coefficients(tensor, gram, weights_of(self.params, len(gram)))
        if found is None:
            return [None] * len(gram)
        return [(float(order != 0), factor) for order, factor in enumerate(found)]

    def coefficients(self, tensor: str, gram: Array, weights: list[float]) -> list[float] | None:
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

    def coefficients(self, tensor: str, gram: Array, weights: list[float]) -> list[float] | None:
        return nuslerp(gram, weights[1])


class MultiSlerp(_OnArc):
    """The direction of the mean of directions."""

    def coefficients(self, tensor: str, gram: Array, weights: list[float]) -> list[float] | None:
        return multislerp(gram, weights, tensor)


class Karcher(_OnArc):
    """The Riemannian mean of directions."""

    def coefficients(self, tensor: str, gram: Array, weights: list[float]) -> list[float] | None:
        return karcher(gram, weights, tensor, self.params["iterations"], self.params["tolerance"])


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


def nuslerp(gram: Array, t: float) -> list[float] | None:
    """Slerp of two vectors as they are, from the first at t = 0: sin((1 - t) o) / sin o and sin(t o) / sin o, o their angle.

    As MergeKit's nuslerp, which takes t = w_2 / (w_1 + w_2), weights or (with a base) task vectors, and the line below a
    sine of 1e-8; where one vector is zero it gives sin(t pi / 2) times the other, which here is the line.
    """
    norms, cosines = _polar(gram)
    if _straight(cosines, norms > 0):
        return None
    angle = math.acos(cosines[0, 1])
    return [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]


def multislerp(gram: Array, weights: Sequence[float] | None, tensor: str) -> list[float] | None:
    """The direction of the weighted mean of the unit vectors, with the weighted mean of the norms as its length.

    MergeKit's multislerp moves on from there along the exponential map of the mean tangent vector. But that is the part of
    the same mean across its own direction, so zero. Raises `TechniqueError`, naming `tensor`, where the unit vectors
    cancel out.
    """
    return _on_sphere(gram, weights, f"multislerp of {tensor}", 0, 0)


def karcher(
    gram: Array, weights: Sequence[float] | None, tensor: str, iterations: int = 10, tolerance: float = 1e-5
) -> list[float] | None:
    """The weighted Riemannian mean of the unit vectors, with the weighted mean of the norms as its length.

    From the direction m of their mean, m <- exp_m(sum_i w_i log_m(u_i)), at most `iterations` times and until a step is
    shorter than `tolerance` radians, as in MergeKit (whose weights are equal). Raises `TechniqueError`, naming `tensor`,
    where the unit vectors cancel out: no mean is nearer than others then, and MergeKit's is the first expert.
    """
    return _on_sphere(gram, weights, f"karcher of {tensor}", iterations, tolerance)


def mean_cosine(squared_norm: float, n: int, zeros: int = 0) -> float:
    """Mean cosine over all pairs of `n` task vectors, from the squared norm of the sum of their unit vectors.

    The n (n - 1) ordered pairs make up what |sum u|^2 holds beside the squares |u_i|^2. `zeros` of the task vectors are
    zero: they add nothing to the sum, and their cosines count as 0. A single task vector agrees with itself: 1.
    """
    if n > 1 and n - zeros <= 1:
        return (
            0.0  # no pair: what would be left is rounding, and the next fold cannot tell it from a direction
        )
    return (squared_norm - (n - zeros)) / (n * (n - 1)) if n > 1 else 1.0


def model_stock(cosine: float, n: int, tensor: str, raw: bool = False) -> float:
    """Model Stock (arXiv 2403.19522): t = N cos / (1 + (N - 1) cos), the coefficient of the mean of N task vectors.

    t stays within [0, 1]. With `raw`, as in MergeKit and TIME's code, a negative mean cosine extrapolates past the base;
    raises `TechniqueError`, naming `tensor`, at the pole -1 / (N - 1), where the unit task vectors cancel out.
    """
    if cosine <= 0 and not raw:
        return 0.0
    slope = 1 + (n - 1) * cosine
    if slope <= ANGLE**2:
        raise TechniqueError(
            f"model_stock of {tensor}: the task vectors of the {n} experts cancel out, and raw puts such a tensor "
            "infinitely far from the base; without raw it stays there"
        )
    t = n * cosine / slope
    if abs(1 - t) <= ANGLE:  # copies of one expert, but for the rounding of their unit vectors
        return 1.0
    return t if raw else min(t, 1.0)


def _on_sphere(
    gram: Array, weights: Sequence[float] | None, what: str, iterations: int, tolerance: float
) -> list[float] | None:
    """Coefficients of the Riemannian mean after so many steps from the direction of the arithmetic one."""
    norms, cosines = _polar(gram)
    shares = _shares(weights, len(norms))
    drawn = np.where(norms > 0, shares, 0)
    if _straight(cosines, drawn > 0):
        return None
    drawn /= drawn.sum()
    if _length(drawn, cosines) <= ANGLE:
        raise TechniqueError(
            f"{what}: the directions of the {len(norms)} experts cancel out, so there is no direction between them; "
            "change the weights, or take average"
        )
    mean = drawn / _length(drawn, cosines)
    for _ in range(iterations):
        step = _tangent(mean, drawn, cosines)
        length = _length(step, cosines)
        if length < tolerance:
            break
        mean = math.cos(length) * mean + math.sin(length) / length * step
        mean /= _length(mean, cosines)
    return (mean * (shares @ norms) / np.where(norms > 0, norms, 1)).tolist()


def _tangent(mean: Array, shares: Array, cosines: Array) -> Array:
    """The weighted mean of the logarithms at `mean`: (o_i / sin o_i) (u_i - cos o_i m). A vector opposite to m has none."""
    along = np.clip(cosines @ mean, -1, 1)
    across = np.sqrt(1 - along * along)
    pull = shares * np.where(across > ANGLE, np.arccos(along) / np.maximum(across, ANGLE), 1)
    return pull - (pull @ along) * mean


def _polar(gram: Array) -> tuple[Array, Array]:
    """Norms, and cosines between the vectors; all of a zero vector's are 0."""
    norms = np.sqrt(np.diag(gram))
    products = np.outer(norms, norms)
    cosines = np.divide(gram, products, out=np.zeros_like(products), where=products > 0)
    return norms, np.clip(cosines, -1, 1)


def _shares(weights: Sequence[float] | None, n: int) -> Array:
    given = np.ones(n) if weights is None else np.asarray(weights, np.float64)
    if len(given) != n:
        raise TechniqueError(
            f"weights has {len(given)} entries but there are {n} experts; give one per expert"
        )
    if not given.sum() > 0:
        raise TechniqueError("weights add up to 0; give at least one expert a weight above 0")
    return given / given.sum()


def _straight(cosines: Array, counts: Array) -> bool:
    """Whether the vectors that count are all parallel or antiparallel."""
    inner = cosines[np.ix_(counts, counts)]
    return bool((1 - inner * inner <= ANGLE**2).all())


def _length(coefficients: Array, cosines: Array) -> float:
    return math.sqrt(max(float(coefficients @ cosines @ coefficients), 0.0))


def weights_of(params: Mapping[str, Any], count: int) -> list[float]:
    """What every expert weighs in the mean of all: its share when it came, less what later ones took."""
    left, weights = 1.0, []
    for order in range(count, 0, -1):
        part = share(params, order)
        weights.append(left * part)
        left *= 1 - part
    return weights[::-1]
