"""Means weighted by importance: of an expert in a tensor (SCE), or of single elements (PCB).

A rule requests statistics of whole tensors in `prepare` (thresholds of a quantity of all experts, norms) and reads them from each
expert's `Place`. The functions at the end measure the quantities. Sums run in the order of the experts and in float64.
"""

from dataclasses import replace
from typing import Any

from merge_service.blocks.questions import (
    Ask,
    Count,
    Findings,
    Key,
    Quantity,
    Ranks,
    Summed,
    Sums,
    Thresholds,
    Window,
)
from merge_service.blocks.search import search
from merge_service.techniques.definition import Technique
from merge_service.techniques.params import GRANULARITY, HALF, LOGIT_SCALE, SCALE, Param, of_expert
from merge_service.techniques.place import Array, Place, Seen, View
from merge_service.techniques.rule import Blocks, Params, Places, Together, total, widened
from merge_service.techniques.thinning import exact, portion, thresholds


class Selection(Together):
    """SCE: a mean of the values that agree with the elected sign, weighted by energy (SCE in FuseChat, arXiv 2408.07990).

    Positions whose variance over experts is below `place.thresholds` are not selected; `place.gain` is an expert's energy. Votes
    that cancel exactly count as plus, as in the reference.
    """

    local = True

    def prepare(self, ask: Ask, view: View, found: Findings) -> Findings:
        if not view.orders:
            return found
        if self.params["density"] < 1:
            found = found.with_(thresholds=self._variances(ask, view))
        sums = ask(Sums((Quantity("energy", wide=True, joint=True, given=found, measure=energy),)))
        assert isinstance(sums, Summed)
        keys = [(name, order) for name, _ in view.combined for order in view.orders]
        return found.with_(gains={key: sums.total("energy", *key) for key in keys})

    def combined(self, xp: Any, blocks: Blocks, places: Places) -> Array:
        taus = selected(xp, blocks, places) if self.params["erase_unselected"] else blocks
        up = total(xp, taus) >= 0
        weighted, weights = 0.0, 0.0
        for tau, place in zip(widened(xp, taus), places):
            weight = xp.asarray(xp.where(up, tau > 0, tau < 0), dtype=xp.float64) * place.gain
            weighted, weights = weighted + weight * tau, weights + weight
        return weighted / xp.where(weights == 0, 1.0, weights)

    def _variances(self, ask: Ask, view: View) -> dict[Key, Thresholds]:
        """The least variance over experts that is selected, by tensor; the values that are not zero must be counted first."""
        quantity = Quantity("variance", wide=True, joint=True, measure=differences)
        nothing = {(name, 0): (Window(0, 0, 0),) for name in view.group_sizes}
        counted: Any = ask(Count(nothing, quantity=quantity))
        ranks = {
            key: differing_ranks(self.params["density"], int(zeros.bins[0][0]))
            for key, zeros in counted.items()
        }
        least = search(ranks, ask, quantity, count_frozen=True)
        return {
            (name, order): Thresholds(found.low)
            for (name, _), found in least.items()
            for order in view.orders
        }


class Balance(Together):
    """PCB: a mean weighted by how far an expert's score is above its threshold (PCB, arXiv 2410.02396, eq. 2 to 7).

    `place.thresholds` bound the magnitudes of an expert, `place.scores` are its threshold and its largest score. If all scores
    are equal (0 / 0 in the reference), the positive ones count alike.
    """

    local = True

    def prepare(self, ask: Ask, view: View, found: Findings) -> Findings:
        clamps = thresholds(ask, view, clamp_ranks(self.params["winsorize"]), found)
        found = found.with_(thresholds=clamps)
        quantity = Quantity("score", wide=True, signed=True, joint=True, given=found, measure=scores)
        density = self.params["density"]
        ranks = {
            (group, order): score_ranks(of_expert(density, order))
            for order in view.orders
            for group in view.group_sizes
        }
        return found.with_(scores=search(ranks, ask, quantity, count_frozen=True))

    def combined(self, xp: Any, blocks: Blocks, places: Places) -> Array:
        weighted, weights = 0.0, 0.0
        for which, (tau, place) in enumerate(zip(blocks, places)):
            found, least, most = score(xp, self.params, blocks, places, which), *_ends(place.scores)
            if most > least:
                share = _spread(xp, found, least, most)
            else:
                share = xp.asarray((found == most) & (found > 0), dtype=xp.float64)
            sizes = xp.asarray(xp.abs(tau), dtype=xp.float64)
            clamped = xp.sign(tau) * xp.clip(sizes, *_ends(place.thresholds))
            weighted, weights = weighted + share * clamped, weights + share
        return weighted / xp.where(weights < 1e-12, 1e-12, weights)


def selected(xp: Any, taus: Blocks, places: Places) -> list[Array]:
    """Task vectors where experts differ enough, else zero."""
    chosen = variance(xp, taus) >= places[0].thresholds.low
    return [xp.where(chosen, tau, 0) for tau in taus]


def variance(xp: Any, taus: Blocks) -> Array:
    """N^2 times the variance over experts, float64; exactly zero where all are equal, above zero elsewhere."""
    added, squares = 0.0, 0.0
    for tau in taus:
        apart = xp.asarray(tau, dtype=xp.float64) - taus[0]
        added, squares = added + apart, squares + apart * apart
    return len(taus) * squares - added * added


def score(xp: Any, params: Params, taus: Blocks, places: Places, which: int) -> Array:
    """Importance within a task vector times agreement with the others, float64.

    exp(N (|tau|^2 - 1)) with |tau| clamped to its thresholds and scaled to 0..1: the reference's exp(N |tau|^2) up to a factor,
    which does not overflow.
    """
    tau = xp.asarray(taus[which], dtype=xp.float64)
    size = _scaled(xp, tau, places[which])
    if params["inter_balance"] == "sum":
        between = xp.tanh(tau * total(xp, taus))
    else:
        own, between = xp.sign(tau) * size, 0.0
        for other, place in zip(widened(xp, taus), places):
            between = between + xp.tanh(own * (xp.sign(other) * _scaled(xp, other, place)))
    return xp.exp(len(taus) * (size * size - 1)) * between


def energy(seen: Seen, order: int) -> Array:
    """Squares of one expert's task vector where experts differ enough, float64."""
    import numpy as np

    return np.square(seen.once(selected)[seen.orders.index(order)], dtype=np.float64)


def differences(seen: Seen, order: int) -> Array:
    """The variance over experts, which is the same for each."""
    import numpy as np

    return variance(np, seen.blocks)


def scores(seen: Seen, order: int) -> Array:
    """The score of one expert."""
    import numpy as np

    return score(np, seen.params, seen.blocks, seen.places, seen.orders.index(order))


def differing_ranks(density: float, zeros: int) -> Ranks:
    """SCE: the int(density * m)-th largest of the m values that are not zero, one at least; without any, no threshold."""

    def ranks(n: int) -> tuple[int | None, int | None]:
        keep = max(portion(exact(density), n - zeros), 1)
        return (n - keep + 1 if n > zeros else None), None

    return ranks


def clamp_ranks(winsorize: float) -> Ranks:
    """PCB (pcb-merging.py): the smallest and the largest magnitude that stay; one large value at least is clamped."""

    def ranks(n: int) -> tuple[int | None, int | None]:
        bottom = portion(exact(winsorize), n)
        return bottom + 1, max(int(n * (1 - exact(winsorize)) - 1), bottom) + 1

    return ranks


def score_ranks(density: float) -> Ranks:
    """PCB: the score with weight zero, and the largest."""

    def ranks(n: int) -> tuple[int | None, int | None]:
        return min(portion(1 - exact(density), n), n - 1) + 1, n

    return ranks


def _scaled(xp: Any, tau: Array, place: Place) -> Array:
    return _spread(xp, xp.abs(tau), *_ends(place.thresholds))


def _spread(xp: Any, values: Array, low: float, high: float) -> Array:
    """Clamped to low..high and mapped to 0..1; all zero if the two are equal."""
    return (xp.clip(values, low, high) - low) / (high - low if high > low else 1.0)


def _ends(between: Thresholds) -> tuple[float, float]:
    return between.low, between.high


TECHNIQUES = (
    Technique(
        "sce",
        "θ = θ0 + scale · Σ_i w_i τ̂_i / Σ_i w_i over i with sign(τ̂_i) = sign(Σ_j τ̂_j); w_i = |τ̂_i|²; τ̂_i = τ_i where the "
        "variance over experts is in the top density of its tensor, else 0",
        "SCE in FuseChat, arXiv 2408.07990",
        # density: the authors' configuration (select_topk .1); MergeKit's default is 1, which selects everything.
        (
            replace(
                HALF,
                each=False,
                alone="positions are selected where all experts differ most",
                default=0.1,
                doc="fraction of the positions where experts differ that is selected",
            ),
            Param(
                "erase_unselected",
                "bool",
                True,
                "whether positions not selected stay at the base (MergeKit) or only do not count in the weights (FuseAI's code)",
            ),
            SCALE,
            LOGIT_SCALE,
        ),
        unweighed="experts are weighted by their energy",
        rule=Selection,
        forms=frozenset({"merge", "fold"}),
        breaks={
            "P5": "the positions selected depend on all experts",
            "P8": "votes that cancel exactly go to plus, as in the reference",
        },
    ),
    Technique(
        "pcb",
        "θ = θ0 + scale · Σ_i s_i τ̂_i / Σ_i s_i; s_i in [0, 1]: rank above the (1 - density) quantile of "
        "exp(N · |τ̂_i|²) · tanh(τ_i Σ_j τ_j), |τ̂_i| scaled to [0, 1]",
        "Parameter competition balancing, arXiv 2410.02396",
        (
            replace(
                HALF,
                default=0.1,
                doc="fraction of every task vector with the highest scores that counts; one per expert where it is a list",
            ),
            Param(
                "winsorize",
                "float",
                1e-4,
                "fraction of smallest and of largest magnitudes set to the nearest one within; pcb-merging.py has 1e-4, the "
                "authors' vision code 0.01",
                0,
                0.49,
            ),
            Param(
                "inter_balance",
                "choice",
                "sum",
                "agreement between experts: sum is tanh(τ_i Σ_j τ_j) (pcb-merging.py), pairs is Σ_j tanh(τ̄_i τ̄_j) of task "
                "vectors scaled to [-1, 1] (the vision code with search)",
                choices=("sum", "pairs"),
            ),
            GRANULARITY,
            SCALE,  # the authors' lambda: 1.2 fixed, searched from 1.0
            LOGIT_SCALE,
        ),
        unweighed="experts are weighted by their scores, element by element",
        rule=Balance,
        forms=frozenset({"merge", "fold"}),
        breaks={
            "P2": "copies of one expert give the part of it that scores high",
            "P5": "scores depend on all experts",
            "P7": "tanh of an absolute magnitude",
            "P10": "the smallest magnitudes are raised",
        },
    ),
)
