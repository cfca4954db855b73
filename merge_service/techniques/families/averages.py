"""Means of weights: of all experts, of the running model and the new one, or of the experts and the base."""

from typing import Any

from merge_service.techniques.definition import Technique
from merge_service.techniques.params import AVERAGING, LOGIT_SCALE, SHARING, Param
from merge_service.techniques.place import Array, Election, Place, State
from merge_service.techniques.rule import Rule
from merge_service.techniques.scaling import Factor


class Mean(Rule):
    """Running mean of weights: m <- m - (m - x) * share. Equal experts give themselves, bit for bit."""

    floats = ("mean",)
    kernel = "mean"
    averages = True
    weighs = True

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


TECHNIQUES = (
    Technique(
        "average",
        "θ = Σ w_i θ_i / Σ w_i;  fold: θ = (1 - weight) · running + weight · new",
        "Model soups, arXiv 2203.05482; weights that grow with time as in TIME, arXiv 2412.06712",
        (*AVERAGING, LOGIT_SCALE),
        rule=Mean,
        space="weights",
    ),
    Technique(
        "wise_ft",
        "θ = (1 - weight) · θ0 + weight · Σ w_i θ_i / Σ w_i",
        "WiSE-FT, arXiv 2109.01903",
        (
            Param("weight", "float", 0.5, "weight of the experts' mean; the base gets 1 - weight", 0, 1),
            *SHARING,
            LOGIT_SCALE,
        ),
        rule=Mean,
        scale=Factor("weight"),
        forms=frozenset({"merge", "stream"}),  # in a fold `weight` is the new expert's: that is `average`
        breaks={"P2": "copies of one expert are drawn to the base unless weight is 1"},
    ),
)
