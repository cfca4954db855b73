"""Model Stock: the mean task vector, scaled by how far the experts agree on its direction."""

import math

from merge_service.errors import TechniqueError
from merge_service.techniques.definition import Technique
from merge_service.techniques.families.arcs import ANGLE
from merge_service.techniques.params import LOGIT_SCALE, Param
from merge_service.techniques.place import Array, State
from merge_service.techniques.rule import Tensor, TensorRule


class Stock(TensorRule):
    """The mean task vector of a tensor times a factor that depends on the mean cosine over pairs of task vectors."""

    floats = ("mean", "unit")
    tallies = ("zeros",)

    def add(self, tensor: Tensor, state: State, order: int) -> None:
        norm = math.sqrt(tensor.squared(tau for _, tau in tensor.blocks(order)))
        if norm == 0:
            state["zeros"] += 1
        for where, tau in tensor.blocks(order):
            mean = state["mean"][where]
            state["mean"][where] = mean - (mean - tau) * (1 / order)
            if norm:
                state["unit"][where] += tau * (1 / norm)

    def result(self, tensor: Tensor, state: State, count: int) -> Array:
        cosine = mean_cosine(tensor.squared(tensor.cut(state["unit"])), count, int(state["zeros"][0]))
        return state["mean"] * model_stock(cosine, count, tensor.name, raw=self.params["ratio"] == "raw")


def mean_cosine(squared_norm: float, n: int, zeros: int = 0) -> float:
    """Mean cosine over all pairs of `n` task vectors, from the squared norm of the sum of their unit vectors.

    |sum u|^2 is the sum over the n (n - 1) ordered pairs and the squares |u_i|^2. `zeros` of the task vectors are zero: they add
    nothing to the sum, and their cosines count as 0. A single task vector agrees with itself: 1.
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


TECHNIQUES = (
    Technique(
        "model_stock",
        "θ = θ0 + t · mean_i τ_i per tensor, t = N cos / (1 + (N-1) cos), cos the mean cosine over pairs of τ",
        "Model Stock, arXiv 2403.19522",
        (
            Param(
                "ratio",
                "choice",
                "clamped",
                "clamped: t stays in [0, 1]; raw: opposed experts extrapolate past the base (MergeKit, TIME's code)",
                choices=("clamped", "raw"),
            ),
            LOGIT_SCALE,
        ),
        unweighed="its ratio follows from the angles between experts that count alike",
        rule=Stock,
        breaks={"P1": "has no factor of the task vector; nothing merged is the base"},
    ),
)
