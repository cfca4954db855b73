"""The arithmetic of every technique: small functions over arrays, and nothing else.

A technique is put together from three parts. *Sparsify* thins out one expert's task vector. *Combine* keeps a state of a
few arrays per element, adds one expert at a time in canonical order, and turns the state into weights or a task vector.
*Scale* is a factor per tensor. No part sees a file, a thread or the rest of the model: it is given a block and a `Place`
that holds what is known about it.

A merge of N experts IS `add` N times and then `result`, so streaming equals batch bit for bit by construction.

Two surprises. Subtracting (m - x) instead of adding (x - m), and adding a task vector as base - (0 - tau), both keep the
sign of a zero: -0.0 + 0.0 is 0.0, but -0.0 - 0.0 is -0.0, and an untouched weight must come out bit-equal.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from merge_service.bits import overwrite, split_signs, word_mask, zero_unless
from merge_service.engine import Scratch
from merge_service.errors import TechniqueError
from merge_service.masks import kept
from merge_service.techniques import Technique
from merge_service.thresholds import EVERYTHING, Limits

Array = np.ndarray
State = dict[str, Array]


@dataclass(frozen=True)
class Place:
    """What a rule may know of the block it is given, apart from its numbers.

    `order` counts experts from 1. `share` is the expert's part of the mean so far. `arc` holds the two factors of a slerp,
    None where it falls back to a straight line. `limits`, `key` and `density` serve sparsifying; `start` is the index of the
    block's first element in its tensor.
    """

    order: int = 1
    share: float = 1.0
    arc: tuple[float, float] | None = None
    limits: Limits = EVERYTHING
    key: int | None = None
    density: float = 1.0
    start: int = 0


@dataclass(frozen=True)
class Election:
    """How a block voted: elected pluses minus minuses, and whether any element's sum cancelled exactly."""

    balance: int = 0
    contested: bool = False


class Combine(Protocol):
    """How experts come together. `floats` and `counts` name the arrays of the state, which start at zero."""

    floats: tuple[str, ...]
    counts: tuple[str, ...]

    def add(self, state: State, x: Array, place: Place, scratch: Scratch) -> None:
        """Take one expert's block (weights, or a thinned-out task vector) into the state; `x` stays as it is."""

    def result(self, state: State, majority: int, scratch: Scratch) -> tuple[Array, Election]:
        """The combined block; may use up the state. `majority` is the sign for elements whose vote is a tie."""


class Mean:
    """Running mean of weights: m <- m - (m - x) * share. Equal experts give themselves, bit for bit."""

    floats: tuple[str, ...] = ("mean",)
    counts: tuple[str, ...] = ()

    def add(self, state: State, x: Array, place: Place, scratch: Scratch) -> None:
        mean = state["mean"]
        if place.order == 1 or place.share == 1:
            np.copyto(mean, x)
        elif place.share:
            step = np.subtract(mean, x, out=scratch.take("step", x.size, mean.dtype))
            np.multiply(step, place.share, out=step)
            np.subtract(mean, step, out=mean)

    def result(self, state: State, majority: int, scratch: Scratch) -> tuple[Array, Election]:
        return state["mean"], Election()


class Slerp(Mean):
    """Along the great circle from the first to the second where `place.arc` says so, else along the straight line."""

    def add(self, state: State, x: Array, place: Place, scratch: Scratch) -> None:
        if place.order == 1 or place.arc is None or place.share in (0, 1):
            super().add(state, x, place, scratch)
            return
        mean = state["mean"]
        np.multiply(mean, place.arc[0], out=mean)
        turned = np.multiply(x, place.arc[1], out=scratch.take("step", x.size, mean.dtype))
        np.add(mean, turned, out=mean)


class Sum:
    """Sum of task vectors."""

    floats: tuple[str, ...] = ("sum",)
    counts: tuple[str, ...] = ()

    def add(self, state: State, x: Array, place: Place, scratch: Scratch) -> None:
        np.add(state["sum"], x, out=state["sum"])

    def result(self, state: State, majority: int, scratch: Scratch) -> tuple[Array, Election]:
        return state["sum"], Election()


class Largest:
    """Per element the task vector of largest magnitude; of equal magnitudes the later expert's."""

    floats: tuple[str, ...] = ("largest",)
    counts: tuple[str, ...] = ()

    def add(self, state: State, x: Array, place: Place, scratch: Scratch) -> None:
        held = state["largest"]
        new = np.abs(x, out=scratch.take("new", x.size, x.dtype))
        old = np.abs(held, out=scratch.take("old", x.size, x.dtype))
        wins = np.greater_equal(new, old, out=scratch.take("wins", x.size, np.bool_))
        overwrite(word_mask(wins, x.dtype, scratch), held, x, scratch)

    def result(self, state: State, majority: int, scratch: Scratch) -> tuple[Array, Election]:
        return state["largest"], Election()


class Disjoint:
    """TIES election: per element the sign of the summed task vectors, then what agrees with it: mean, sum or largest.

    The state holds the positive sum P, the negative sum Q, and how many made up each (or, for max, the extremes). Where
    P + Q cancels exactly the majority sign of the group decides; where that is a tie as well, nothing agrees and the
    element stays at the base (TIES-Merging, section on electing signs; its code takes the negative side there).
    """

    def __init__(self, consensus: str) -> None:
        self.consensus = consensus
        self.floats: tuple[str, ...] = (
            ("plus", "minus", "top", "bottom") if consensus == "max" else ("plus", "minus")
        )
        self.counts: tuple[str, ...] = ("pluses", "minuses") if consensus == "mean" else ()

    def add(self, state: State, x: Array, place: Place, scratch: Scratch) -> None:
        plus, minus = split_signs(x, scratch)
        np.add(state["plus"], plus, out=state["plus"])
        np.add(state["minus"], minus, out=state["minus"])
        if self.counts:
            sign = scratch.take("sign", x.size, np.bool_)
            np.add(state["pluses"], np.greater(x, 0, out=sign), out=state["pluses"])
            np.add(state["minuses"], np.less(x, 0, out=sign), out=state["minuses"])
        if self.consensus == "max":
            np.maximum(state["top"], x, out=state["top"])
            np.minimum(state["bottom"], x, out=state["bottom"])

    def result(self, state: State, majority: int, scratch: Scratch) -> tuple[Array, Election]:
        plus, minus = state["plus"], state["minus"]
        total = np.add(plus, minus, out=scratch.take("total", plus.size, plus.dtype))
        up = np.greater(total, 0, out=scratch.take("up", plus.size, np.bool_))
        down = np.less(total, 0, out=scratch.take("down", plus.size, np.bool_))
        ups, downs = int(np.count_nonzero(up)), int(np.count_nonzero(down))
        contested = False
        if ups + downs < plus.size:
            tied = (total == 0) & (plus > 0)
            contested = bool(tied.any())
            if contested and majority:
                elected = up if majority > 0 else down
                np.logical_or(elected, tied, out=elected)
        high, low = ("top", "bottom") if self.consensus == "max" else ("plus", "minus")
        out = self._either(state[high], state[low], up, down, scratch)
        if self.counts:
            np.multiply(state["pluses"], up, out=state["pluses"])
            np.multiply(state["minuses"], down, out=state["minuses"])
            votes = np.add(state["pluses"], state["minuses"], out=state["pluses"])
            np.divide(out, np.maximum(votes, 1, out=votes), out=out)
        return out, Election(ups - downs, contested)

    @staticmethod
    def _either(high: Array, low: Array, up: Array, down: Array, scratch: Scratch) -> Array:
        """`high` where up, `low` where down, 0 where neither; uses up its arguments."""
        zero_unless(word_mask(up, high.dtype, scratch), high)
        zero_unless(word_mask(down, low.dtype, scratch), low)
        return np.add(high, low, out=high)


def combination(technique: Technique, params: Mapping[str, Any]) -> Combine:
    """The combine part of a technique."""
    if technique.combine == "disjoint":
        return Disjoint(params["consensus"])
    plain: dict[str, type[Mean] | type[Sum] | type[Largest]] = {
        "mean": Mean,
        "slerp": Slerp,
        "sum": Sum,
        "largest": Largest,
    }
    return plain[technique.combine]()


def sparsify(technique: Technique, delta: Array, place: Place, scratch: Scratch) -> None:
    """Thin out a task vector in place."""
    if technique.sparsify == "random":
        _drop_at_random(delta, place, scratch)
    elif technique.sparsify != "none":
        _drop_by_magnitude(delta, place.limits, scratch)


def _drop_at_random(delta: Array, place: Place, scratch: Scratch) -> None:
    """DARE: keep with probability density, divide what is kept by density. A key of None (scalars) keeps everything."""
    if place.key is None or place.density == 1:
        return
    keep = kept(place.key, place.start, delta.size, place.density, scratch)
    zero_unless(word_mask(keep, delta.dtype, scratch), delta)
    np.multiply(delta, 1 / place.density, out=delta)


def _drop_by_magnitude(delta: Array, limits: Limits, scratch: Scratch) -> None:
    size = np.abs(delta, out=scratch.take("size", delta.size, delta.dtype))
    keep = scratch.take("keep", delta.size, np.bool_)
    if limits.low > 0:
        np.greater_equal(size, _bound(limits.low, delta.dtype, up=True), out=keep)
        zero_unless(word_mask(keep, delta.dtype, scratch), delta)
    if limits.high < math.inf:
        np.less_equal(size, _bound(limits.high, delta.dtype, up=False), out=keep)
        zero_unless(word_mask(keep, delta.dtype, scratch), delta)


def _bound(limit: float, dtype: np.dtype, *, up: bool) -> np.floating[Any]:
    """The limit in the block's own type, rounded inwards, so that a comparison there means what it means in float64."""
    bound = dtype.type(limit)
    if float(bound) != limit and (float(bound) < limit) == up:
        bound = np.nextafter(bound, dtype.type(math.inf if up else -math.inf))
    return bound


def share(params: Mapping[str, Any], order: int) -> float:
    """The part of expert number `order` (1-based) in the weighted mean of experts 1..order.

    fold and slerp: the second has `weight`. merge: w_n / (w_1 + ... + w_n), with w from `weights` or growing by `schedule`:
    linear i, sqrt, quadratic, cubic, exp 2^(i-1), log ln(i + 1) (TIME's non-uniform offline weighting).
    """
    if order == 1:
        return 1.0
    if "weight" in params:
        return float(params["weight"])
    if params["weights"] is not None:
        if order > len(params["weights"]):
            raise TechniqueError(
                f"weights has {len(params['weights'])} entries but there are at least {order} experts"
            )
        total = math.fsum(params["weights"][:order])
        return float(params["weights"][order - 1] / total) if total else 0.0
    if params["schedule"] == "uniform":
        return 1 / order
    if params["schedule"] == "exp":
        return 0.5 / (1 - 2.0**-order)  # 2^(n-1) / (2^n - 1) without the powers, which overflow
    growth = _GROWTH[params["schedule"]]
    return growth(order) / math.fsum(growth(i) for i in range(1, order + 1))


_GROWTH = {
    "linear": lambda i: i,
    "sqrt": math.sqrt,
    "quadratic": lambda i: i * i,
    "cubic": lambda i: i**3,
    "log": lambda i: math.log(i + 1),
}


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
