"""Elected signs: task vectors are thinned out, every element elects a sign, and the values that agree are combined (TIES)."""

from typing import Any

from merge_service.techniques.definition import Technique
from merge_service.techniques.params import (
    CONSENSUS,
    COUNT_FROZEN,
    DENSITY,
    EPSILON,
    GRANULARITY,
    HALF,
    LOGIT_SCALE,
    OUTLIERS,
    RESCALE,
    SCALE,
    SEED,
    WEIGHING,
    Param,
)
from merge_service.techniques.place import Array, Election, Place, State
from merge_service.techniques.rule import Params, Rule
from merge_service.techniques.shares import is_weighed
from merge_service.techniques.thinning import AtRandom, Band, ByRank, TopMagnitudes

TRIM = Param(
    "trim",
    "float",
    1.0,
    "fraction of largest magnitudes that a second, TIES-like trim keeps after the random drop, zeros counted. "
    "1: none (TIME, MergeKit); FusionBench and MergeLM have 0.2",
    0,
    1,
    above_low=True,
)
_ELECT = "θ = θ0 + scale · mean{τ̂_i : sign(τ̂_i) = sign(Σ_j τ̂_j)}"
_NOT_IDENTITY = {"P2": "copies of one expert give its thinned-out task vector, not the expert"}


class Disjoint(Rule):
    """TIES election: per element the sign of the summed task vectors, then the mean, sum or largest of the values that agree.

    The state holds the positive sum P, the negative sum Q, for the mean the number of values in each (pluses in the lower 16 bits
    of `votes`, minuses in the upper), and for max the extremes. Where P + Q cancels exactly, the majority sign of the group
    decides. If that is a tie as well, no value agrees and the element stays at the base (TIES-Merging, section on electing signs;
    its code takes the negative side there).
    """

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        self.consensus = params["consensus"]
        self.adds = self.consensus == "sum"
        extremes = ("top", "bottom") if self.consensus == "max" else ()
        self.floats = ("plus", "minus", *extremes)
        self.words = ("votes",) if self.consensus == "mean" else ()
        self.kernel = f"{self.consensus} of sign"

    def add(self, xp: Any, state: State, x: Array, place: Place) -> None:
        up, down = _voting(xp, state, x)
        if self.words:
            state["votes"] = state["votes"] + xp.where(up, 1, 0) + xp.where(down, 1 << 16, 0)

    def result(self, xp: Any, state: State, majority: int) -> tuple[Array, Election]:
        up, down, election = voted(state, majority)
        out = _agreeing(xp, state, up, down)
        if self.words:
            count = xp.where(up, state["votes"] & 0xFFFF, state["votes"] >> 16)
            out = out / xp.asarray(xp.where(count > 1, count, 1), dtype=out.dtype)
        return out, election


class DisjointSums(Disjoint):
    """The same without extremes, so that an expert's part can be subtracted.

    The sum of a side without experts is exactly zero, if votes are counted; a rest of rounding never changes a side's sign.
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


class WeightedElection(Rule):
    """The same election over task vectors times their experts' weights; the mean divides by the weights of those that agree.

    The state also holds these weights, by their size, for each side.
    """

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        self.consensus = params["consensus"]
        self.adds = self.consensus == "sum"
        more = {"max": ("top", "bottom"), "mean": ("plus_weight", "minus_weight")}.get(self.consensus, ())
        self.floats = ("plus", "minus", *more)

    def add(self, xp: Any, state: State, x: Array, place: Place) -> None:
        weight = place.weight
        x = x * weight
        up, down = _voting(xp, state, x)
        if self.consensus == "mean":
            state["plus_weight"] = state["plus_weight"] + xp.where(up, x * 0 + abs(weight), 0)
            state["minus_weight"] = state["minus_weight"] + xp.where(down, x * 0 + abs(weight), 0)

    def result(self, xp: Any, state: State, majority: int) -> tuple[Array, Election]:
        up, down, election = voted(state, majority)
        out = _agreeing(xp, state, up, down)
        if self.consensus == "mean":
            sizes = xp.where(up, state["plus_weight"], state["minus_weight"])
            out = out / xp.where(up | down, sizes, 1)
        return out, election


def _voting(xp: Any, state: State, x: Array) -> tuple[Array, Array]:
    """Add values to the sums of both sides, and to the extremes if the state has them; where they vote plus, and where minus."""
    up, down = x > 0, x < 0
    state["plus"] = state["plus"] + xp.where(up, x, 0)
    state["minus"] = state["minus"] + xp.where(down, x, 0)
    if "top" in state:
        state["top"] = xp.where(x > state["top"], x, state["top"])
        state["bottom"] = xp.where(x < state["bottom"], x, state["bottom"])
    return up, down


def _agreeing(xp: Any, state: State, up: Array, down: Array) -> Array:
    """The sum of the elected side, or its extreme if the state has extremes; zero where no side is elected."""
    high, low = ("top", "bottom") if "top" in state else ("plus", "minus")
    return xp.where(up, state[high], xp.where(down, state[low], 0))


def voted(state: State, majority: int) -> tuple[Array, Array, Election]:
    """The elements that elected plus, those that elected minus, and how the block voted."""
    plus, minus = state["plus"], state["minus"]
    total = plus + minus
    up, down, tied = total > 0, total < 0, (total == 0) & (plus > 0)
    election = Election(int(up.sum()) - int(down.sum()), bool(tied.any()))
    if election.contested and majority:
        up, down = (up | tied, down) if majority > 0 else (up, down | tied)
    return up, down, election


def elected(params: Params) -> Rule:
    """The rule of an election by sign; extremes cannot be subtracted."""
    if is_weighed(params):
        return WeightedElection(params)
    return Disjoint(params) if params["consensus"] == "max" else DisjointSums(params)


TECHNIQUES = (
    Technique(
        "ties",
        "τ̂_i = τ_i where |τ_i| is in the top density, else 0;  " + _ELECT,
        "TIES-Merging, arXiv 2306.01708",
        (DENSITY, CONSENSUS, GRANULARITY, COUNT_FROZEN, SCALE, *WEIGHING, LOGIT_SCALE),
        rule=elected,
        thin=TopMagnitudes,
        breaks=_NOT_IDENTITY,
    ),
    Technique(
        "dare_ties",
        "τ̂_i = τ_i / density with probability density, else 0;  " + _ELECT,
        "DARE, arXiv 2311.03099; with TIES election as in TIME, arXiv 2412.06712",
        (DENSITY, RESCALE, SEED, CONSENSUS, TRIM, GRANULARITY, SCALE, *WEIGHING, LOGIT_SCALE),
        rule=elected,
        thin=AtRandom,
        breaks=_NOT_IDENTITY | {"P10": "kept values are divided by density"},
    ),
    Technique(
        "breadcrumbs_ties",
        "τ̂_i = τ_i without its smallest (1 - density - outliers) and largest (outliers) magnitudes;  "
        + _ELECT,
        "Model Breadcrumbs, arXiv 2312.06795; with TIES election as in TIME, arXiv 2412.06712",
        (DENSITY, OUTLIERS, CONSENSUS, GRANULARITY, COUNT_FROZEN, SCALE, *WEIGHING, LOGIT_SCALE),
        rule=elected,
        thin=Band,
        breaks=_NOT_IDENTITY,
    ),
    Technique(
        "della",
        "τ̂_i = τ_i / p with probability p, else 0; p = density ± epsilon by the rank of |τ_i| in its row;  "
        + _ELECT,
        "DELLA-Merging, arXiv 2406.11617",
        # epsilon: MergeKit's default; consensus mean: MergeKit (normalize) and the paper; density .5 leaves room for epsilon.
        (HALF, EPSILON, RESCALE, SEED, CONSENSUS, GRANULARITY, SCALE, *WEIGHING, LOGIT_SCALE),
        rule=elected,
        thin=ByRank,
        breaks=_NOT_IDENTITY | {"P10": "kept values are divided by their probability"},
    ),
)
