"""The arithmetic of every technique: small functions over arrays, and nothing else.

A technique is put together from three parts. *Thin* thins out one expert's task vector (`thinning.py`). *Combine* keeps a state of a
few arrays per element, adds one expert at a time in canonical order, and turns the state into weights or a task vector.
*Scale* is a factor per tensor. No part sees a file, a thread, a device or the rest of the model: it is given a block and a
`Place` that holds what is known about it. `xp` is numpy, or torch when the blocks lie on a device; only what both have is used.

A merge of N experts IS `add` N times and then `result`, so streaming equals batch bit for bit by construction. Rules with
a `kernel` number run as fused loops (kernels.py) on the CPU; what is written here is their definition. Rules that cannot be
fed one expert at a time are in `joint.py`.

Two surprises. Subtracting (m - x) instead of adding (x - m), and adding a task vector as base - (0 - tau), both keep the
sign of a zero: -0.0 + 0.0 is 0.0, but -0.0 - 0.0 is -0.0, and an untouched weight must come out bit-equal.
"""

import math
from collections.abc import Mapping
from typing import Any, Protocol

from merge_service.blocks import kernels
from merge_service.blocks.masks import hashes
from merge_service.blocks.questions import Limits
from merge_service.errors import TechniqueError
from merge_service.techniques.definition import Technique
from merge_service.techniques.joint import Rule, joint_rule
from merge_service.techniques.place import Array, Election, Place, State
from merge_service.techniques.thinning import bounds


class Combine(Protocol):
    """How experts come together. `floats` and `words` (uint32) name the state's arrays, which start at zero.

    `kernel` is the number of the fused loop that does the same, None if there is none. A rule from whose state an expert can
    be taken out again has a method `remove` like `add`; there `share` is its weight over that of those who stay.
    """

    floats: tuple[str, ...]
    words: tuple[str, ...]
    kernel: int | None

    def add(self, xp: Any, state: State, x: Array, place: Place) -> None:
        """Take one expert's block (weights, or a thinned-out task vector) into the state; `x` stays as it is."""

    def result(self, xp: Any, state: State, majority: int) -> tuple[Array, Election]:
        """The combined block. `majority` is the sign for elements whose vote is a tie."""


class Mean:
    """Running mean of weights: m <- m - (m - x) * share. Equal experts give themselves, bit for bit."""

    floats: tuple[str, ...] = ("mean",)
    words: tuple[str, ...] = ()
    kernel: int | None = kernels.MEAN

    def add(self, xp: Any, state: State, x: Array, place: Place) -> None:
        mean = state["mean"]
        if place.turn is not None:
            state["mean"] = mean * place.turn[0] + x * place.turn[1]
        elif place.order == 1 or place.share == 1:
            state["mean"] = x
        elif place.share:
            state["mean"] = mean - (mean - x) * place.share

    def remove(self, xp: Any, state: State, x: Array, place: Place) -> None:
        mean = state["mean"]
        state["mean"] = mean - (x - mean) * place.share

    def result(self, xp: Any, state: State, majority: int) -> tuple[Array, Election]:
        return state["mean"], Election()


class Sum:
    """Sum of task vectors."""

    floats: tuple[str, ...] = ("sum",)
    words: tuple[str, ...] = ()
    kernel: int | None = kernels.SUM

    def add(self, xp: Any, state: State, x: Array, place: Place) -> None:
        state["sum"] = state["sum"] + x

    def remove(self, xp: Any, state: State, x: Array, place: Place) -> None:
        state["sum"] = state["sum"] - x

    def result(self, xp: Any, state: State, majority: int) -> tuple[Array, Election]:
        return state["sum"], Election()


class Largest:
    """Per element the task vector of largest magnitude; of equal magnitudes the later expert's."""

    floats: tuple[str, ...] = ("largest",)
    words: tuple[str, ...] = ()
    kernel: int | None = kernels.LARGEST

    def add(self, xp: Any, state: State, x: Array, place: Place) -> None:
        held = state["largest"]
        state["largest"] = xp.where(xp.abs(x) >= xp.abs(held), x, held)

    def result(self, xp: Any, state: State, majority: int) -> tuple[Array, Election]:
        return state["largest"], Election()


class Disjoint:
    """TIES election: per element the sign of the summed task vectors, then what agrees with it: mean, sum or largest.

    The state holds the positive sum P, the negative sum Q, and for the mean how many made up each (pluses in the lower 16
    bits of `votes`, minuses in the upper), for max the extremes. Where P + Q cancels exactly the majority sign of the group
    decides; where that is a tie as well, nothing agrees and the element stays at the base (TIES-Merging, section on
    electing signs; its code takes the negative side there).
    """

    def __init__(self, consensus: str) -> None:
        self.consensus = consensus
        self.floats: tuple[str, ...] = (
            ("plus", "minus", "top", "bottom") if consensus == "max" else ("plus", "minus")
        )
        self.words: tuple[str, ...] = ("votes",) if consensus == "mean" else ()
        self.kernel: int | None = {
            "mean": kernels.MEAN_OF_SIGN,
            "sum": kernels.SUM_OF_SIGN,
            "max": kernels.MAX_OF_SIGN,
        }[consensus]

    def add(self, xp: Any, state: State, x: Array, place: Place) -> None:
        up, down = x > 0, x < 0
        state["plus"] = state["plus"] + xp.where(up, x, 0)
        state["minus"] = state["minus"] + xp.where(down, x, 0)
        if self.words:
            state["votes"] = state["votes"] + xp.where(up, 1, 0) + xp.where(down, 1 << 16, 0)
        if self.consensus == "max":
            state["top"] = xp.where(x > state["top"], x, state["top"])
            state["bottom"] = xp.where(x < state["bottom"], x, state["bottom"])

    def result(self, xp: Any, state: State, majority: int) -> tuple[Array, Election]:
        plus, minus = state["plus"], state["minus"]
        total = plus + minus
        up, down, tied = total > 0, total < 0, (total == 0) & (plus > 0)
        election = Election(int(up.sum()) - int(down.sum()), bool(tied.any()))
        if election.contested and majority:
            up, down = (up | tied, down) if majority > 0 else (up, down | tied)
        high, low = (state["top"], state["bottom"]) if self.consensus == "max" else (plus, minus)
        out = xp.where(up, high, xp.where(down, low, 0))
        if self.words:
            count = xp.where(up, state["votes"] & 0xFFFF, state["votes"] >> 16)
            out = out / xp.asarray(xp.where(count > 1, count, 1), dtype=out.dtype)
        return out, election


class DisjointSums(Disjoint):
    """The same without extremes, so that an expert's part can be subtracted.

    Where nobody is left on a side its sum is exactly zero, as far as votes were counted; a rest of rounding never changes
    a side's sign.
    """

    def remove(self, xp: Any, state: State, x: Array, place: Place) -> None:
        up, down = x > 0, x < 0
        plus = state["plus"] - xp.where(up, x, 0)
        minus = state["minus"] - xp.where(down, x, 0)
        some_plus, some_minus = plus > 0, minus < 0
        if self.words:
            votes = state["votes"] - xp.where(up, 1, 0) - xp.where(down, 1 << 16, 0)
            some_plus, some_minus = some_plus & ((votes & 0xFFFF) > 0), some_minus & ((votes >> 16) > 0)
            state["votes"] = votes
        state["plus"], state["minus"] = xp.where(some_plus, plus, 0), xp.where(some_minus, minus, 0)


class Contributors:
    """RAM: the mean over the experts that moved an element further than `threshold`."""

    floats: tuple[str, ...] = ("sum",)
    words: tuple[str, ...] = ("count",)
    kernel: int | None = None

    def __init__(self, threshold: float) -> None:
        self.limits = Limits(0, threshold)

    def add(self, xp: Any, state: State, x: Array, place: Place) -> None:
        moved = xp.abs(x) > bounds(self.limits, x.dtype)[1]
        state["sum"] = state["sum"] + xp.where(moved, x, 0)
        state["count"] = state["count"] + xp.where(moved, 1, 0)

    def result(self, xp: Any, state: State, majority: int) -> tuple[Array, Election]:
        count, total = state["count"], state["sum"]
        return total / xp.asarray(xp.where(count > 1, count, 1), dtype=total.dtype), Election()


class Draw:
    """Per element the task vector of the expert that draws the highest hash; of equal ones the larger value."""

    floats: tuple[str, ...] = ("drawn",)
    words: tuple[str, ...] = ("hash",)
    kernel: int | None = None

    def add(self, xp: Any, state: State, x: Array, place: Place) -> None:
        assert place.key is not None
        held, high = state["drawn"], state["hash"]
        new = hashes(xp, place.key, place.start, x)
        taken = (new > high) | ((new == high) & (x > held)) if place.order > 1 else new >= 0
        state["drawn"], state["hash"] = xp.where(taken, x, held), xp.where(taken, new, high)

    def result(self, xp: Any, state: State, majority: int) -> tuple[Array, Election]:
        return state["drawn"], Election()


class Together:
    """A rule that must see all experts' blocks at once: they are gathered, and nothing is done before the end."""

    floats: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    kernel: int | None = None

    def __init__(self, rule: Rule) -> None:
        self.rule = rule

    def add(self, xp: Any, state: State, x: Array, place: Place) -> None:
        state.setdefault("blocks", []).append(x)
        state.setdefault("places", []).append(place)

    def result(self, xp: Any, state: State, majority: int) -> tuple[Array, Election]:
        out = self.rule(xp, state["blocks"], state["places"])
        return xp.asarray(out, dtype=state["blocks"][0].dtype), Election()


def combination(technique: Technique, params: Mapping[str, Any]) -> Combine:
    """The combine part of a technique."""
    if technique.combine == "disjoint":
        return (Disjoint if params["consensus"] == "max" else DisjointSums)(params["consensus"])
    if technique.combine == "contributors":
        return Contributors(params["threshold"])
    rule = joint_rule(technique, params)
    if rule:
        return Together(rule)
    plain: dict[str, type[Mean] | type[Sum] | type[Largest] | type[Draw]] = {
        "mean": Mean,
        "slerp": Mean,
        "spherical": Mean,
        "sum": Sum,
        "largest": Largest,
        "draw": Draw,
    }
    return plain[technique.combine]()


def share(params: Mapping[str, Any], order: int) -> float:
    """The part of expert number `order` (1-based) in the weighted mean of experts 1..order.

    fold and slerp: the second has `weight`. merge: w_n / (w_1 + ... + w_n), with w from `weights` or growing by `schedule`:
    linear i, sqrt, quadratic, cubic, exp 2^(i-1), log ln(i + 1) (TIME's non-uniform offline weighting).
    """
    if order == 1:
        return 1.0
    if "weight" in params:
        return float(params["weight"])
    if params.get("weights") is not None:
        if order > len(params["weights"]):
            raise TechniqueError(
                f"weights has {len(params['weights'])} entries but there are at least {order} experts"
            )
        total = math.fsum(params["weights"][:order])
        return float(params["weights"][order - 1] / total) if total else 0.0
    if params.get("schedule", "uniform") == "uniform":
        return 1 / order
    if params["schedule"] == "exp":
        return 0.5 / (1 - 2.0**-order)  # 2^(n-1) / (2^n - 1) without the powers, which overflow
    growth = _GROWTH[params["schedule"]]
    return growth(order) / math.fsum(growth(i) for i in range(1, order + 1))


def leaving_share(params: Mapping[str, Any], order: int, count: int) -> float:
    """w / (W - w): an expert's weight over that of the `count` - 1 experts that stay when number `order` leaves the mean.

    Raises `TechniqueError` where its leaving would change the weights of others, or leave no weight.
    """
    if params["weights"] is not None:
        weights = params["weights"][:count]
        rest = math.fsum(weights[: order - 1] + weights[order:])
        if not rest:
            raise TechniqueError("no expert that stays has a weight above zero; merge those that stay anew")
        return float(weights[order - 1] / rest)
    if params["schedule"] != "uniform" and order != count:
        raise TechniqueError(
            f"with schedule {params['schedule']} the weights of the experts after number {order} follow from their place, "
            "which changes when it leaves; only the newest can be taken out. Merge those that stay anew"
        )
    part = share(params, order) if order == count else 1 / count
    return part / (1 - part)


_GROWTH = {
    "linear": lambda i: i,
    "sqrt": math.sqrt,
    "quadratic": lambda i: i * i,
    "cubic": lambda i: i**3,
    "log": lambda i: math.log(i + 1),
}
