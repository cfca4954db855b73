"""Merges with learned coefficients: factors by tensor, by column, or a mask over all weights, from one file for all experts.

Coefficients are learned elsewhere, on data (`workers/learning`). What is merged here depends on the file's numbers alone, so a learned
merge splits, resumes and hashes like all others.

Invariant: the temperature of the model has coefficients only where the file names it.
"""

import math
from dataclasses import replace
from typing import Any

from merge_service.errors import TechniqueError
from merge_service.techniques.definition import Evidence, Technique
from merge_service.techniques.families.elections import voted
from merge_service.techniques.params import DENSITY, GRANULARITY, LOGIT_SCALE, SUM_SCALE, Param
from merge_service.techniques.place import Array, Election, Place, State
from merge_service.techniques.rule import Facts, Params, Rule, Tensor, TensorRule
from merge_service.techniques.thinning import TopMagnitudes

COEFFICIENTS = (Evidence("coefficients", of="learned"),)
ADAPTED_ON = Param(
    "adapted_on",
    "choice",
    "training",
    "on which images the coefficients were learned; test marks a merge whose scores are those of test-time adaptation",
    choices=("training", "test"),
    quiet=True,
)
TRIM = Param(
    "trim",
    "bool",
    False,
    "AdaMerging++: task vectors keep their largest magnitudes (density) that agree with the elected sign",
)
TEMPERATURE = Param("temperature", "float", 0.5, "of the mask's sigmoid", 0, above_low=True)
KEPT_SCALE = replace(LOGIT_SCALE, default="base")
"""Entropy must not move the temperature: it falls when the model is made surer, not better."""
_MERGED = frozenset({"merge", "fold"})
_SUM = {
    "P2": "copies of one expert add up",
    "P5": "coefficients belong to one list of experts",
    "P10": "a sum leaves the convex hull",
}


class Learned(Rule):
    """Σ c_i τ_i with the learned factors of the tensor."""

    floats: tuple[str, ...] = ("sum",)
    adds = True
    learned = True
    streams = False

    def add(self, xp: Any, state: State, x: Array, place: Place) -> None:
        state["sum"] = state["sum"] + x * place.weight

    def result(self, xp: Any, state: State, majority: int) -> tuple[Array, Election]:
        return state["sum"], Election()


class LearnedTanh(Learned):
    """Σ tanh(w_i) τ_i: the file holds w."""

    def add(self, xp: Any, state: State, x: Array, place: Place) -> None:
        state["sum"] = state["sum"] + x * math.tanh(place.weight)


class LearnedElection(Learned):
    """The same sum over the values that agree with the sign of Σ τ_i, factors apart."""

    floats = ("plus", "minus", "plus_sum", "minus_sum")

    def add(self, xp: Any, state: State, x: Array, place: Place) -> None:
        up, down, weighed = x > 0, x < 0, x * place.weight
        for side, on, value in (
            ("plus", up, x),
            ("minus", down, x),
            ("plus_sum", up, weighed),
            ("minus_sum", down, weighed),
        ):
            state[side] = state[side] + xp.where(on, value, 0)

    def result(self, xp: Any, state: State, majority: int) -> tuple[Array, Election]:
        up, down, election = voted(state, majority)
        return xp.where(up, state["plus_sum"], xp.where(down, state["minus_sum"], 0)), election


class Trim(TopMagnitudes):
    """The largest magnitudes, if task vectors are trimmed at all."""

    def __init__(self, params: Params) -> None:
        super().__init__({**params, "density": params["density"] if params["trim"] else 1.0})


class Columns(TensorRule):
    """Σ W_i diag(c_i): a factor for every input of a map, of every expert. The mean where nothing was learned."""

    learned = True
    streams = False

    def add(self, tensor: Tensor, state: State, order: int) -> None:
        factors = tensor.factors()
        for where, x in tensor.blocks(order):
            if factors is None:
                state["sum"][where] += x / len(tensor.orders)
            else:
                state["sum"][where] += x * along(factors[order - 1], tensor.facts, where).astype(x.dtype)

    def result(self, tensor: Tensor, state: State, count: int) -> Array:
        return state["sum"]


class Mask(TensorRule):
    """m · Σ τ_i with one mask for all experts, m = sigmoid(x / T) divided by its mean; 1 where no logits were learned."""

    learned = True
    streams = False
    adds = True

    def result(self, tensor: Tensor, state: State, count: int) -> Array:
        logits = tensor.statistic(1)
        if logits is None:
            return state["sum"]
        if logits.size != tensor.numel:
            raise TechniqueError(
                f"mask logits of {tensor.name} have shape {list(logits.shape)}, not that of the tensor; learn them again"
            )
        return state["sum"] * masked(logits.reshape(-1), self.params["temperature"]).astype(
            state["sum"].dtype
        )


def masked(logits: Array, temperature: float) -> Array:
    """The mask of logits: values from 0 on with mean 1. Logits that are all equal give 1."""
    kept = 1 / (1 + math.e ** (-(logits / temperature).clip(-700, 700)))
    return kept / kept.mean()


def along(factors: Array, facts: Facts, where: slice) -> Array:
    """Factors [columns] of one expert as those of elements `where` of the flattened tensor: a column is an input of the map.

    Raises `TechniqueError` for a number of factors that the tensor's shape does not allow.
    """
    count, linear, numel = factors.size, facts.linear, facts.numel
    if count == 1:
        return factors.reshape(-1)[[0]]
    if numel % count:
        raise TechniqueError(f"{count} coefficients for {facts.name} of {numel} elements; learn them again")
    by_row = linear is not None and linear.first and not linear.diagonal
    if by_row and count != linear.inputs:  # type: ignore[union-attr]
        raise TechniqueError(f"{count} coefficients for {facts.name}, which has {linear.inputs} inputs")  # type: ignore[union-attr]
    repeats = numel // count
    first, last = where.start, where.stop
    if by_row:
        rows = factors[first // repeats : (last - 1) // repeats + 1]
        return rows.repeat(repeats)[first % repeats :][: last - first]
    whole = factors[[*range(first % count, count), *range(first % count)]] if first % count else factors
    return whole.reshape(1, -1).repeat(-(-(last - first) // count), 0).reshape(-1)[: last - first]


TECHNIQUES = (
    Technique(
        "adamerging",
        "θ = θ0 + Σ_i c_i τ_i, c learned per tensor or model; trim: over the τ_i that TIES keeps and elects",
        "AdaMerging, arXiv 2310.02575",
        (
            TRIM,
            replace(DENSITY, each=False, alone="experts were trimmed to it while coefficients were learned"),
            replace(GRANULARITY, default="model"),
            ADAPTED_ON,
            KEPT_SCALE,
        ),
        unweighed="coefficients are learned; give the file that learn wrote (--coefficients FILE)",
        rule=lambda params: LearnedElection(params) if params["trim"] else Learned(params),
        thin=Trim,
        evidence=COEFFICIENTS,
        forms=_MERGED,
        breaks=_SUM,
    ),
    Technique(
        "supermerge",
        "θ = θ0 + Σ_i tanh(w_i) τ_i, w learned per tensor on labels",
        "SUPERMERGE, arXiv 2412.10416",
        (ADAPTED_ON, LOGIT_SCALE),
        unweighed="coefficients are learned; give the file that learn wrote (--coefficients FILE)",
        rule=LearnedTanh,
        evidence=COEFFICIENTS,
        forms=_MERGED,
        breaks=_SUM,
    ),
    Technique(
        "tinting",
        "θ = θ0 + Σ_i c_i τ_i, c learned per tensor with a head per task, which the file has too",
        "Merging with tinted heads, arXiv 2412.19098",
        (ADAPTED_ON, KEPT_SCALE),
        unweighed="coefficients are learned; give the file that learn wrote (--coefficients FILE)",
        rule=Learned,
        evidence=COEFFICIENTS,
        forms=frozenset({"merge"}),
        breaks=_SUM,
    ),
    Technique(
        "dam",
        "W = Σ_i W_i diag(c_i), c learned per input of every map",
        "Differentiable Adaptive Merging, arXiv 2410.08371",
        (ADAPTED_ON, LOGIT_SCALE),
        unweighed="coefficients are learned; give the file that learn wrote (--coefficients FILE)",
        rule=Columns,
        space="weights",
        evidence=COEFFICIENTS,
        forms=frozenset({"merge"}),
        breaks=_SUM,
    ),
    Technique(
        "concrete",
        "θ = θ0 + scale · m Σ_i τ_i, m = sigmoid(x / temperature) / its mean, x learned per weight",
        "Concrete subspace learning, arXiv 2312.06173",
        (SUM_SCALE, TEMPERATURE, ADAPTED_ON, KEPT_SCALE),
        unweighed="coefficients are learned; give the file that learn wrote (--coefficients FILE)",
        rule=Mask,
        evidence=COEFFICIENTS,
        forms=frozenset({"merge"}),
        breaks=_SUM,
    ),
)
