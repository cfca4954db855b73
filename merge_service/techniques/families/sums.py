"""Sums of task vectors, as they are or thinned out."""

from dataclasses import replace
from typing import Any

from merge_service.techniques.definition import Technique
from merge_service.techniques.params import (
    COUNT_FROZEN,
    EPSILON,
    GRANULARITY,
    HALF,
    LOGIT_SCALE,
    OUTLIERS,
    RESCALE,
    SCALE,
    SEED,
    SUM_SCALE,
    WEIGHING,
)
from merge_service.techniques.place import Array, Election, Place, State
from merge_service.techniques.rule import Params, Rule
from merge_service.techniques.shares import is_weighed
from merge_service.techniques.thinning import AtRandom, ByRank, Crumbs

GRANULARITY_ROW = replace(
    GRANULARITY,
    default="row",
    doc="over what magnitudes are ranked: row is the last dimension (the released code), tensor is MergeKit's",
    choices=("model", "tower", "tensor", "row"),
)
_HULL = "a sum leaves the convex hull"


class Sum(Rule):
    """Sum of task vectors."""

    floats = ("sum",)
    kernel = "sum"
    adds = True

    def add(self, xp: Any, state: State, x: Array, place: Place) -> None:
        state["sum"] = state["sum"] + x

    def remove(self, xp: Any, state: State, x: Array, place: Place) -> None:
        state["sum"] = state["sum"] - x

    def result(self, xp: Any, state: State, majority: int) -> tuple[Array, Election]:
        return state["sum"], Election()


class WeightedSum(Rule):
    """Sum of task vectors, each times its expert's weight (`Place.weight`)."""

    floats = ("sum",)
    adds = True

    def add(self, xp: Any, state: State, x: Array, place: Place) -> None:
        state["sum"] = state["sum"] + x * place.weight

    def result(self, xp: Any, state: State, majority: int) -> tuple[Array, Election]:
        return state["sum"], Election()


def summed(params: Params) -> Rule:
    """The rule of a sum, with weights where there are any."""
    return WeightedSum(params) if is_weighed(params) else Sum(params)


TECHNIQUES = (
    Technique(
        "task_arithmetic",
        "θ = θ0 + scale · Σ_i τ_i",
        "Task arithmetic, arXiv 2212.04089",
        (SUM_SCALE, *WEIGHING, LOGIT_SCALE),
        rule=summed,
        breaks={"P2": "copies of one expert add up unless scale * N = 1", "P10": _HULL},
    ),
    Technique(
        "breadcrumbs",
        "θ = θ0 + scale · Σ_i m_i τ_i, m_i = 0 on the outliers largest magnitudes of n, 1 on the next density · n, else 0",
        "Model Breadcrumbs, arXiv 2312.06795",
        # density, outliers, scale: where the authors' search starts (keep .15, remove .006, alpha .2).
        (
            replace(HALF, default=0.15),
            replace(OUTLIERS, default=0.006),
            GRANULARITY_ROW,
            COUNT_FROZEN,
            replace(SCALE, default=0.2),
            *WEIGHING,
            LOGIT_SCALE,
        ),
        rule=summed,
        thin=Crumbs,
        breaks={"P2": "copies of one expert add up, thinned out", "P10": _HULL},
    ),
    Technique(
        "dare",
        "θ = θ0 + scale · Σ_i τ̂_i, τ̂_i = τ_i / density with probability density, else 0",
        "DARE, arXiv 2311.03099",
        # density, scale: FusionBench's DareTaskArithmetic for CLIP (sparsity .5, scaling .3); papers drop up to .9.
        (HALF, RESCALE, SEED, SUM_SCALE, *WEIGHING, LOGIT_SCALE),
        rule=summed,
        thin=AtRandom,
        breaks={
            "P2": "copies of one expert are dropped apart and add up",
            "P10": "kept values are divided by density",
        },
        aliases=("dare_linear",),
    ),
    Technique(
        "della_linear",
        "θ = θ0 + scale · Σ_i τ̂_i, τ̂_i = τ_i / p with probability p, else 0; p = density ± epsilon by the rank of |τ_i| in "
        "its row",
        "DELLA-Merging, arXiv 2406.11617; summed as in MergeKit, arXiv 2403.13257",
        (HALF, EPSILON, RESCALE, SEED, SUM_SCALE, *WEIGHING, LOGIT_SCALE),
        rule=summed,
        thin=ByRank,
        breaks={
            "P2": "copies of one expert are dropped apart and add up",
            "P10": "kept values are divided by their probability",
        },
    ),
)
