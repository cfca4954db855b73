"""Rules that must see the blocks of all experts at once: blocks are gathered, and nothing is done before the end.

What such a rule needs of whole tensors (thresholds of a quantity that is made of all experts, norms) it asks for in `prepare` and finds
in each expert's `Place`; the quantities are measured in `engine/survey.py` by the functions here. Sums run in the order of the
experts and in float64.

Invariant: elementwise, so that blocks may be cut anywhere.
"""

from collections.abc import Callable, Sequence
from typing import Any

from merge_service.blocks.questions import (
    Ask,
    Count,
    Findings,
    Key,
    Limits,
    Quantity,
    Summed,
    Sums,
    Window,
)
from merge_service.blocks.search import search
from merge_service.errors import TechniqueError
from merge_service.techniques.place import Array, Election, Place, State, View
from merge_service.techniques.ranks import clamp_ranks, differing_ranks, score_ranks
from merge_service.techniques.rule import Params, Rule
from merge_service.techniques.thinning import everywhere, thresholds

Blocks = Sequence[Array]
Places = Sequence[Place]


class Together(Rule):
    """A rule that must see all experts' blocks at once."""

    def add(self, xp: Any, state: State, x: Array, place: Place) -> None:
        state.setdefault("blocks", []).append(x)
        state.setdefault("places", []).append(place)

    def result(self, xp: Any, state: State, majority: int) -> tuple[Array, Election]:
        out = self.combined(xp, state["blocks"], state["places"])
        return xp.asarray(out, dtype=state["blocks"][0].dtype), Election()

    def combined(self, xp: Any, blocks: Blocks, places: Places) -> Array:
        """What the experts' blocks come to, in their order."""
        raise NotImplementedError


class Own(Together):
    """The function of somebody else's technique, whose answer may be anything."""

    def __init__(self, name: str, function: Callable[..., Any], params: Params) -> None:
        super().__init__(params)
        self.name, self.function = name, function

    def combined(self, xp: Any, blocks: Blocks, places: Places) -> Array:
        shape = blocks[0].shape
        made = self.function(xp, dict(self.params), list(blocks))
        if getattr(made, "shape", None) != shape:
            raise TechniqueError(
                f"{self.name} gave {type(made).__name__} of shape {getattr(made, 'shape', None)} for blocks of shape "
                f"{shape}; it must return one array of the blocks' shape"
            )
        return made


class Agreed(Together):
    """Consensus merging."""

    def combined(self, xp: Any, blocks: Blocks, places: Places) -> Array:
        return consensus(xp, self.params, blocks, places)


class NearSwap(Together):
    """The first model, moved towards the second."""

    def combined(self, xp: Any, blocks: Blocks, places: Places) -> Array:
        return nearswap(xp, self.params, blocks, places)


class Selection(Together):
    """SCE: the positions where experts differ most, weighted by energy."""

    def prepare(self, ask: Ask, view: View, found: Findings) -> Findings:
        if not view.orders:
            return found
        if self.params["density"] < 1:
            found = found.with_(thresholds=self._variances(ask, view))
        sums = ask(Sums((Quantity("energy", wide=True, joint=True, given=found),)))
        assert isinstance(sums, Summed)
        keys = [(name, order) for name, _ in view.combined for order in view.orders]
        return found.with_(gains={key: sums.total("energy", *key) for key in keys})

    def combined(self, xp: Any, blocks: Blocks, places: Places) -> Array:
        return sce(xp, self.params, blocks, places)

    def _variances(self, ask: Ask, view: View) -> dict[Key, Limits]:
        """The least variance over experts that is selected, by tensor; how many are not zero must be counted first."""
        quantity = Quantity("variance", wide=True, joint=True)
        nothing = {(name, 0): (Window(0, 0, 0),) for name in view.group_sizes}
        counted: Any = ask(Count(nothing, quantity=quantity))
        ranks = {
            key: differing_ranks(self.params["density"], int(zeros.bins[0][0]))
            for key, zeros in counted.items()
        }
        limits = search(ranks, ask, quantity, count_frozen=True)
        return {
            (name, order): Limits(least.low) for (name, _), least in limits.items() for order in view.orders
        }


class Balance(Together):
    """PCB: a mean weighted by how far an expert's score is above its threshold."""

    def prepare(self, ask: Ask, view: View, found: Findings) -> Findings:
        clamps = thresholds(ask, view, clamp_ranks(self.params["winsorize"]), found)
        found = found.with_(thresholds=clamps)
        quantity = Quantity("score", wide=True, signed=True, joint=True, given=found)
        ranks = everywhere(view, score_ranks(self.params["density"]))
        return found.with_(scores=search(ranks, ask, quantity, count_frozen=True))

    def combined(self, xp: Any, blocks: Blocks, places: Places) -> Array:
        return pcb(xp, self.params, blocks, places)


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
