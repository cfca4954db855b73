"""Elements weighted by measured importance: Fisher merging, and a trust region for task arithmetic (TATR).

Fisher's state is the weighted mean, the sum of weights and the plain mean, so it streams and its fold is a moving average. TATR's is four
sums, so it streams too; which elements keep the base is found anew from the sums at every arrival.

Invariant: an element without importance in any expert is the mean (Fisher) or harms nobody (TATR).
"""

from collections.abc import Mapping
from typing import Any

from merge_service.blocks.questions import Ask, Findings, Quantity
from merge_service.blocks.search import search
from merge_service.techniques.definition import Evidence, Technique
from merge_service.techniques.params import AVERAGING, LOGIT_SCALE, SUM_SCALE, WEIGHING, Param
from merge_service.techniques.place import Array, Election, Place, Seen, State, View
from merge_service.techniques.rule import Facts, Rule, Tensor, TensorRule
from merge_service.techniques.shares import parts, share


class Fisher(TensorRule):
    """Σ c_i F_i θ_i / Σ c_i F_i per element, as a running mean: equal experts give themselves."""

    floats = ("mean", "weighted")
    weighs = True

    def arrays(self, facts: Facts) -> Mapping[str, tuple[int, Any]]:
        return {**super().arrays(facts), "total": (facts.numel, "float64"), "measured": (1, "uint32")}

    def add(self, tensor: Tensor, state: State, order: int) -> None:
        x, part = tensor.whole(order), share(self.params, order, tensor.name)
        mean = state["mean"]
        state["mean"] = x.copy() if order == 1 or part == 1 else mean - (mean - x) * mean.dtype.type(part)
        found = tensor.statistic(order)
        if found is None:
            return
        importance = found.reshape(-1)
        keep, take = parts(self.params, order, tensor.name)
        norm = tensor.statistics_norm(order) if self.params["normalize"] == "model" else 1.0
        new = take * (importance + self.params["floor"]) / (norm or 1.0)
        total = keep * state["total"] + new
        kept, seen = state["weighted"], total > 0
        step = new / (total + ~seen)
        moved = (kept - (kept.astype("float64") - x) * step).astype(kept.dtype)  # the sign of zero: see rules
        moved[step == 1] = x[step == 1]
        state["weighted"] = moved
        state["total"] = total
        state["measured"] += 1

    def result(self, tensor: Tensor, state: State, count: int) -> Array:
        if int(state["measured"][0]) != count:
            return state["mean"].copy()
        out, seen = state["mean"].copy(), state["total"] > 0
        out[seen] = state["weighted"][seen]
        return out


class TrustRegion(Rule):
    """A sum of task vectors without the elements where they harm other tasks most: Ω = Σ_{i≠j} |g_i| |τ_j|, of task vectors without weights.

    Ω = Σ|g| Σ|τ| - Σ|g||τ|, so three sums beside that of task vectors are the state. `place.scores` bound Ω; elements at or above the
    quantile over the model keep the base. An expert whose gradient was not measured in a tensor counts as 0 there.
    """

    floats = ("sum",)
    doubles = ("gradients", "sizes", "own")
    adds = True
    measured = True

    def prepare(self, ask: Ask, view: View, found: Findings) -> Findings:
        if not view.orders:
            return found
        quantity = Quantity("interference", wide=True, joint=True, measure=interference)
        quantile = self.params["quantile"]
        ranks = {
            (group, 0): lambda total: (min(int(total * quantile) + 1, total), None)
            for group in view.group_sizes
        }
        least = search(ranks, ask, quantity, count_frozen=True)
        keys = [(group, order) for group in view.group_sizes for order in view.orders]
        return found.with_(scores={key: least[key[0], 0] for key in keys})

    def add(self, xp: Any, state: State, x: Array, place: Place) -> None:
        state["sum"] = state["sum"] + (x if place.weight == 1 else x * place.weight)
        _meet(xp, state, x, place)

    def result_at(self, xp: Any, state: State, majority: int, place: Place) -> tuple[Array, Election]:
        return xp.where(_harm(state) < place.scores.low, state["sum"], 0), Election()


def interference(seen: Seen, order: int) -> Array:
    """Ω of the elements that are counted, of all experts so far."""
    import numpy as np

    state = dict(seen.held) or dict.fromkeys(TrustRegion.doubles, 0.0)
    for block, place in zip(seen.blocks, seen.places):
        _meet(np, state, block, place)
    return _harm(state)


def _meet(xp: Any, state: State, x: Array, place: Place) -> None:
    """Add an expert to the three sums, in float64."""
    size = xp.asarray(xp.abs(x), dtype=xp.float64)
    gradient = size * 0 if place.evidence is None else abs(_like(size, place.evidence))
    for role, new in (("gradients", gradient), ("sizes", size), ("own", gradient * size)):
        state[role] = state[role] + new


def _harm(state: State) -> Array:
    return abs(state["gradients"] * state["sizes"] - state["own"])


def _like(block: Array, evidence: Array) -> Array:
    """What was measured, as a block is stored; of a sample's length where a sample is drawn."""
    part = evidence[: len(block)]
    return block.new_tensor(part) if hasattr(block, "new_tensor") else part


TECHNIQUES = (
    Technique(
        "fisher",
        "θ = Σ c_i F_i θ_i / Σ c_i F_i per element, c_i = w_i / |F_i|; where Σ F = 0: mean",
        "Fisher merging, arXiv 2111.09832",
        (
            Param(
                "normalize",
                "choice",
                "model",
                "model: each expert's Fisher information is divided by its norm over the model, so that each counts alike; none: as it is",
                choices=("none", "model"),
            ),
            Param(
                "floor",
                "float",
                0.0,
                "added to the Fisher information of every element (FusionBench 1e-6)",
                0,
            ),
            *AVERAGING,
            LOGIT_SCALE,
        ),
        rule=Fisher,
        space="weights",
        evidence=(Evidence("fisher"),),
        resumes=True,
        keeps="weighted mean, mean and sum of weights, 16 B per weight",
    ),
    Technique(
        "tatr",
        "θ = θ0 + scale · m Σ_i w_i τ_i, m = 0 on the largest Σ_{i≠j} |g_i| |τ_j| of the model, else 1",
        "Task Arithmetic in the Trust Region, arXiv 2501.15065",
        (
            Param("quantile", "float", 0.99, "elements at or above it keep the base", 0, 1),
            Param(
                "granularity",
                "choice",
                "model",
                "over what the quantile is taken",
                choices=("model", "tower", "tensor"),
            ),
            SUM_SCALE,
            *WEIGHING,
            LOGIT_SCALE,
        ),
        rule=TrustRegion,
        evidence=(Evidence("gradient", of="base", labels=True),),
        forms=frozenset({"merge", "stream"}),
        keeps="Σ|g|, Σ|τ|, Σ|g||τ| and Σ τ, 28 B per weight",
        breaks={
            "P2": "copies of one expert add up",
            "P5": "the quantile is over what all experts give",
            "P10": "a sum leaves the convex hull",
        },
    ),
)
