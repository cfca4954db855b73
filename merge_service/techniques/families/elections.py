"""Elected signs: task vectors are thinned out, every element elects a sign, and the values that agree are combined (TIES).

KnOTS elects over coordinates in the singular directions that the task vectors of a matrix share, not over elements.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from merge_service.blocks.questions import Ask, Findings, Quantity
from merge_service.blocks.search import search
from merge_service.blocks.singular import shared_frame, wide
from merge_service.techniques.definition import Technique
from merge_service.techniques.families.spectra import SCOPE
from merge_service.techniques.families.subspaces import ALL_MATRICES, BREAKS, OfMatrices, is_solved
from merge_service.techniques.params import (
    ATTENTION,
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
    of_expert,
)
from merge_service.techniques.place import Array, Election, Place, State, View
from merge_service.techniques.rule import Params, Rule, Tensor
from merge_service.techniques.shares import is_weighed
from merge_service.techniques.thinning import AtRandom, Band, ByRank, TopMagnitudes, trim_ranks, within

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
_GROUPS = 4
"""Groups whose thresholds are looked for at a time, which limits the memory for samples."""


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


class SharedDirections(OfMatrices):
    """KnOTS-TIES: TIES over coordinates in the singular directions that all task vectors of a matrix share."""

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        self.elect = elected(params)
        self.adds = self.elect.adds

    def prepare(self, ask: Ask, view: View, found: Findings) -> Findings:
        ranks = {order: trim_ranks(of_expert(self.params["density"], order)) for order in view.orders}
        trimmed = [order for order in view.orders if ranks[order](10**9) != (None, None)]
        groups = list(view.group_sizes) if trimmed else []
        quantity = Quantity("coordinates", view.wide, tensors=coordinates)
        for first in range(0, len(groups), _GROUPS):
            unknown = {(group, o): ranks[o] for group in groups[first : first + _GROUPS] for o in trimmed}
            found = found.with_(thresholds=search(unknown, ask, quantity, count_frozen=True))
        return found

    def solved(self, tensor: Tensor, taus: list[Array], mean: Array) -> Array:
        places = [Place(order, thresholds=tensor.thresholds(order)) for order in tensor.orders]
        return tensor.solve(tied, *taus, cutoff=self.params["cutoff"], rule=self.elect, places=places)


def coordinates(tensor: Tensor) -> list[Array] | None:
    """The magnitudes of every expert's coordinates in the shared directions of a tensor's matrices, flat; None outside the scope."""
    if not is_solved(tensor):
        return None
    by_piece = []
    for piece in tensor.pieces:
        taus = [tensor.matrix(order, piece) for order in tensor.orders]
        by_piece.append(tensor.solve(in_shared_directions, *taus, cutoff=tensor.params["cutoff"]))
    parts: list[list[Array]] = [[] for _ in tensor.orders]
    for stacked in by_piece:
        for mine, one in zip(parts, stacked):
            mine.append(abs(one.reshape(-1)))
    return [_joined(mine) for mine in parts]


def in_shared_directions(*taus: Array, cutoff: float, xp: Any) -> Array:
    """S V_i^T of N task vectors, (m, n) all: (N, k, n), of their type. k is the number of singular values above `cutoff`."""
    found = shared_frame(taus, cutoff, xp)[1]
    return xp.asarray(xp.stack(found, 0), dtype=taus[0].dtype)


def tied(*taus: Array, cutoff: float, rule: Rule, places: Sequence[Place], xp: Any) -> Array:
    """KnOTS (arXiv 2410.19735, eq. 3 to 5) of N task vectors, (m, n) all: U times the election over the coordinates S V_i^T within the
    thresholds of `places`. Coordinates whose sum cancels exactly elect nothing.
    """
    basis, found = shared_frame(taus, cutoff, xp)
    own = [xp.asarray(one, dtype=taus[0].dtype) for one in found]
    state: State = dict.fromkeys(rule.floats, own[0] * 0)
    state |= {role: xp.where(own[0] != own[0], 1, 0) for role in rule.words}
    for one, place in zip(own, places):
        rule.add(xp, state, within(xp, one, place), place)
    merged, _ = rule.result(xp, state, 0)
    return xp.asarray(basis @ wide(merged, xp), dtype=taus[0].dtype)


def _joined(parts: list[Array]) -> Array:
    import numpy as np

    return np.concatenate(parts)


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
    Technique(
        "knots_ties",
        "θ = θ0 + scale · U M per matrix, [τ_1 .. τ_N] = U S [V_1 .. V_N]ᵀ, M: TIES over all S V_iᵀ; other tensors: mean",
        "Model merging with SVD to tie the KnOTS, arXiv 2410.19735",
        (
            DENSITY,
            CONSENSUS,
            GRANULARITY,
            Param(
                "cutoff",
                "float",
                1e-5,
                "singular values up to it are left out, as released (FusionBench 1e-4)",
                0,
            ),
            replace(SCOPE, doc=f"which matrices: those {ALL_MATRICES}"),
            SCALE,
            ATTENTION,
            LOGIT_SCALE,
        ),
        unweighed="directions are shared by experts that count alike",
        rule=SharedDirections,
        portable=False,
        forms=frozenset({"merge"}),
        breaks={**BREAKS, **_NOT_IDENTITY, "P5": "the shared directions are those of all experts"},
    ),
)
