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

from typing import Any

from merge_service.blocks.masks import hashes
from merge_service.blocks.questions import Limits
from merge_service.techniques.place import Array, Election, Place, State
from merge_service.techniques.rule import Params, Rule
from merge_service.techniques.thinning import bounds


class Mean(Rule):
    """Running mean of weights: m <- m - (m - x) * share. Equal experts give themselves, bit for bit."""

    floats = ("mean",)
    kernel = "mean"
    averages = True

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


class Sum(Rule):
    """Sum of task vectors."""

    floats = ("sum",)
    kernel = "sum"

    def add(self, xp: Any, state: State, x: Array, place: Place) -> None:
        state["sum"] = state["sum"] + x

    def remove(self, xp: Any, state: State, x: Array, place: Place) -> None:
        state["sum"] = state["sum"] - x

    def result(self, xp: Any, state: State, majority: int) -> tuple[Array, Election]:
        return state["sum"], Election()


class Largest(Rule):
    """Per element the task vector of largest magnitude; of equal magnitudes the later expert's."""

    floats = ("largest",)
    kernel = "largest"

    def add(self, xp: Any, state: State, x: Array, place: Place) -> None:
        held = state["largest"]
        state["largest"] = xp.where(xp.abs(x) >= xp.abs(held), x, held)

    def result(self, xp: Any, state: State, majority: int) -> tuple[Array, Election]:
        return state["largest"], Election()


class Disjoint(Rule):
    """TIES election: per element the sign of the summed task vectors, then what agrees with it: mean, sum or largest.

    The state holds the positive sum P, the negative sum Q, and for the mean how many made up each (pluses in the lower 16
    bits of `votes`, minuses in the upper), for max the extremes. Where P + Q cancels exactly the majority sign of the group
    decides; where that is a tie as well, nothing agrees and the element stays at the base (TIES-Merging, section on
    electing signs; its code takes the negative side there).
    """

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        self.consensus = params["consensus"]
        extremes = ("top", "bottom") if self.consensus == "max" else ()
        self.floats = ("plus", "minus", *extremes)
        self.words = ("votes",) if self.consensus == "mean" else ()
        self.kernel = f"{self.consensus} of sign"

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


class Contributors(Rule):
    """RAM: the mean over the experts that moved an element further than `threshold`."""

    floats = ("sum",)
    words = ("count",)

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        self.limits = Limits(0, params["threshold"])

    def add(self, xp: Any, state: State, x: Array, place: Place) -> None:
        moved = xp.abs(x) > bounds(self.limits, x.dtype)[1]
        state["sum"] = state["sum"] + xp.where(moved, x, 0)
        state["count"] = state["count"] + xp.where(moved, 1, 0)

    def result(self, xp: Any, state: State, majority: int) -> tuple[Array, Election]:
        count, total = state["count"], state["sum"]
        return total / xp.asarray(xp.where(count > 1, count, 1), dtype=total.dtype), Election()


class Draw(Rule):
    """Per element the task vector of the expert that draws the highest hash; of equal ones the larger value."""

    floats = ("drawn",)
    words = ("hash",)
    masks_scalars = True

    def add(self, xp: Any, state: State, x: Array, place: Place) -> None:
        assert place.key is not None
        held, high = state["drawn"], state["hash"]
        new = hashes(xp, place.key, place.start, x)
        taken = (new > high) | ((new == high) & (x > held)) if place.order > 1 else new >= 0
        state["drawn"], state["hash"] = xp.where(taken, x, held), xp.where(taken, new, high)

    def result(self, xp: Any, state: State, majority: int) -> tuple[Array, Election]:
        return state["drawn"], Election()


def elected(params: Params) -> Rule:
    """The rule of an election by sign; extremes cannot be taken back."""
    return Disjoint(params) if params["consensus"] == "max" else DisjointSums(params)
