"""Rules that must see the blocks of all experts at once: one pure function each, over the list of blocks in order.

What such a rule needs of whole tensors (thresholds of a quantity that is made of all experts, norms) it finds in each expert's
`Place`; `QUANTITIES` says how those quantities are computed, on a block like everything else. Sums run in the order of the
experts and in float64.

Invariant: elementwise, so that blocks may be cut anywhere.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from merge_service.errors import TechniqueError
from merge_service.techniques.definition import Technique
from merge_service.techniques.place import Array, Place

Params = Mapping[str, Any]
Rule = Callable[[Any, Sequence[Array], Sequence[Place]], Array]


def joint_rule(technique: Technique, params: Params) -> Rule | None:
    """The rule of a technique that needs all blocks at once, None for the others."""
    if technique.rule is not None:
        return _checked(technique, params)
    rules: dict[str, Callable[..., Array]] = {
        "agreed": consensus,
        "clip": nearswap,
        "select": sce,
        "balance": pcb,
    }
    rule = rules.get(technique.combine)
    return (lambda xp, blocks, places: rule(xp, params, blocks, places)) if rule else None


def _checked(technique: Technique, params: Params) -> Rule:
    """The rule of somebody else's technique, whose answer may be anything."""

    def rule(xp: Any, blocks: Sequence[Array], places: Sequence[Place]) -> Array:
        assert technique.rule is not None
        shape = blocks[0].shape
        made = technique.rule(xp, dict(params), list(blocks))
        if getattr(made, "shape", None) != shape:
            raise TechniqueError(
                f"{technique.name} gave {type(made).__name__} of shape {getattr(made, 'shape', None)} for blocks of shape "
                f"{shape}; it must return one array of the blocks' shape"
            )
        return made

    return rule


def consensus(xp: Any, params: Params, taus: Sequence[Array], places: Sequence[Place]) -> Array:
    """The sum of task vectors where enough experts use an element (TALL masks, arXiv 2405.07813, eq. 4 to 6)."""
    total = _sum(xp, taus)
    users = sum(
        xp.asarray(xp.abs(tau) > params["tall_lambda"] * xp.abs(total - tau), dtype=xp.int64)
        for tau in _wide(xp, taus)
    )
    return xp.where(users >= params["min_tasks"], total, 0)


def nearswap(xp: Any, params: Params, weights: Sequence[Array], places: Sequence[Place]) -> Array:
    """The first model, moved towards the second by `threshold` at most (MergeKit: interpolation by threshold / |gap|)."""
    running, new = weights
    gap, most = running - new, params["threshold"]
    arrived = (xp.abs(gap) <= most) & (gap != 0)
    return xp.where(arrived, new, running - xp.clip(gap, -most, most))


def sce(xp: Any, params: Params, taus: Sequence[Array], places: Sequence[Place]) -> Array:
    """A mean of what agrees with the elected sign, weighted by energy (SCE in FuseChat, arXiv 2408.07990).

    Positions whose variance is below `places[i].limits` are not selected; `places[i].gain` is an expert's energy. Votes
    that cancel go to plus, as in the reference.
    """
    if params["erase_unselected"]:
        taus = selected(xp, taus, places)
    up = _sum(xp, taus) >= 0
    weighted, weights = 0.0, 0.0
    for tau, place in zip(_wide(xp, taus), places):
        weight = xp.asarray(xp.where(up, tau > 0, tau < 0), dtype=xp.float64) * place.gain
        weighted, weights = weighted + weight * tau, weights + weight
    return weighted / xp.where(weights == 0, 1.0, weights)


def selected(xp: Any, taus: Sequence[Array], places: Sequence[Place]) -> list[Array]:
    """Task vectors where experts differ enough, else zero."""
    chosen = variance(xp, taus) >= places[0].limits.low
    return [xp.where(chosen, tau, 0) for tau in taus]


def variance(xp: Any, taus: Sequence[Array]) -> Array:
    """N^2 times the variance over experts, float64; exactly zero where all are equal, above zero elsewhere."""
    total, squares = 0.0, 0.0
    for tau in taus:
        apart = xp.asarray(tau, dtype=xp.float64) - taus[0]
        total, squares = total + apart, squares + apart * apart
    return len(taus) * squares - total * total


def pcb(xp: Any, params: Params, taus: Sequence[Array], places: Sequence[Place]) -> Array:
    """A mean weighted by how far an expert's score is above its threshold (PCB, arXiv 2410.02396, eq. 2 to 7).

    `places[i].limits` bound the magnitudes of expert i, `places[i].scores` are its threshold and its largest score. Where all
    scores are equal (0 / 0 in the reference) the positive ones count alike.
    """
    weighted, weights = 0.0, 0.0
    for which, (tau, place) in enumerate(zip(taus, places)):
        found, (least, most) = score(xp, params, taus, places, which), _ends(place.scores)
        if most > least:
            share = _spread(xp, found, least, most)
        else:
            share = xp.asarray((found == most) & (found > 0), dtype=xp.float64)
        clamped = xp.sign(tau) * xp.clip(xp.asarray(xp.abs(tau), dtype=xp.float64), *_ends(place.limits))
        weighted, weights = weighted + share * clamped, weights + share
    return weighted / xp.where(weights < 1e-12, 1e-12, weights)


def score(xp: Any, params: Params, taus: Sequence[Array], places: Sequence[Place], which: int) -> Array:
    """Importance within a task vector times agreement with the others, float64.

    exp(N (|tau|^2 - 1)) with |tau| clamped to the limits and scaled to 0..1: the reference's exp(N |tau|^2) up to a factor,
    which does not overflow.
    """
    tau = xp.asarray(taus[which], dtype=xp.float64)
    size = _scaled(xp, tau, places[which])
    if params["inter_balance"] == "sum":
        between = xp.tanh(tau * _sum(xp, taus))
    else:
        own, between = xp.sign(tau) * size, 0.0
        for other, place in zip(_wide(xp, taus), places):
            between = between + xp.tanh(own * (xp.sign(other) * _scaled(xp, other, place)))
    return xp.exp(len(taus) * (size * size - 1)) * between


def _scaled(xp: Any, tau: Array, place: Place) -> Array:
    return _spread(xp, xp.abs(tau), *_ends(place.limits))


def _spread(xp: Any, values: Array, low: float, high: float) -> Array:
    """Clamped to low..high and mapped to 0..1; all zero where the two are equal, which tells nothing apart."""
    return (xp.clip(values, low, high) - low) / (high - low if high > low else 1.0)


def _ends(limits: Any) -> tuple[float, float]:
    return limits.low, limits.high


def _wide(xp: Any, blocks: Sequence[Array]) -> Any:
    return (xp.asarray(block, dtype=xp.float64) for block in blocks)


def _sum(xp: Any, blocks: Sequence[Array]) -> Array:
    return sum(_wide(xp, blocks))
