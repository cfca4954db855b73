"""Thinning out one expert's task vector: what is kept of it, and what makes up for the rest.

Each way is an object made of a technique's parameters. It says which numbers of whole tensors it needs (thresholds, norms), how it
changes a block, and under what its thresholds may be kept for the next merge.

Rows are the last dimension of a tensor. Blocks come here cut at rows where a way works by rows; what is equal within a row is
treated alike, so nothing depends on how a sort breaks ties.

Invariant: a value's fate depends on its tensor, its expert and its place, never on how tensors are cut into blocks.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from merge_service.blocks.masks import hashes, kept
from merge_service.blocks.questions import Ask, Findings, Key, Limits, Quantity, Ranks, Summed, Sums
from merge_service.blocks.search import search
from merge_service.techniques.place import Array, Place, View
from merge_service.techniques.ranks import band_ranks, crumb_ranks, trim_ranks

Params = Mapping[str, Any]


class KeepAll:
    """Nothing is thinned out. Base of the other ways, which say what differs.

    `rows`: works on whole rows. `fused`: the compiled loops can do it, by thresholds and a mask.
    """

    rows = False
    fused = True

    def __init__(self, params: Params) -> None:
        self.params = params

    def prepare(self, ask: Ask, view: View, found: Findings) -> Findings:
        """What is found already, and the numbers of whole tensors that `apply` needs."""
        return found

    def apply(self, xp: Any, delta: Array, place: Place) -> Array:
        """A block of a task vector, thinned out."""
        return delta

    def identity(self) -> dict[str, Any] | None:
        """What thresholds depend on besides the expert, the base and the tensors; None where there are none to keep."""
        return None


class _Ranked(KeepAll):
    """What lies between two thresholds on magnitudes is kept, thresholds included."""

    kind = ""

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        self.rows = params.get("granularity") == "row"
        self.fused = not self.rows
        self.ranks = self.conventional()

    def conventional(self) -> Ranks:
        """The ranks of the thresholds."""
        raise NotImplementedError

    def prepare(self, ask: Ask, view: View, found: Findings) -> Findings:
        if self.rows or self.ranks(10**9) == (None, None):
            return found
        return found.with_(
            thresholds=thresholds(ask, view, self.ranks, found, self.params.get("count_frozen", True))
        )

    def apply(self, xp: Any, delta: Array, place: Place) -> Array:
        if not self.rows:
            return within(xp, delta, place)
        return between_ranks(xp, delta, place.columns, self.ranks) if place.columns else delta

    def identity(self) -> dict[str, Any] | None:
        if self.rows or self.ranks(10**9) == (None, None):
            return None
        names = ("density", "outliers", "granularity", "count_frozen", "logit_scale")
        rule = {"kind": self.kind, **{name: self.params[name] for name in names if name in self.params}}
        if rule.get("logit_scale") == "unclamped":
            rule["logit_scale"] = "merge"  # both rank it with the others
        return rule


class TopMagnitudes(_Ranked):
    """TIES (arXiv 2306.01708): the largest magnitudes."""

    kind = "trim"

    def conventional(self) -> Ranks:
        return trim_ranks(self.params["density"])


class Band(_Ranked):
    """Breadcrumbs in TIME's convention: without the smallest and the largest magnitudes."""

    kind = "band"

    def conventional(self) -> Ranks:
        return band_ranks(self.params["density"], self.params["outliers"])


class Crumbs(_Ranked):
    """Breadcrumbs as released (arXiv 2312.06795), by rows or by groups of tensors."""

    kind = "crumbs"

    def conventional(self) -> Ranks:
        return crumb_ranks(self.params["density"], self.params["outliers"])


class AtRandom(KeepAll):
    """DARE (arXiv 2311.03099): kept with probability density, and made up for; then trimmed by magnitude where `trim` asks for it."""

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        self.trimmed = params.get("trim", 1) < 1
        self.fused = not self.trimmed

    def prepare(self, ask: Ask, view: View, found: Findings) -> Findings:
        found = _norms(self.params, ask, view, found)
        if not self.trimmed:
            return found
        quantity = Quantity("thinned", view.wide, given=found)
        ranks = everywhere(view, trim_ranks(self.params["trim"]))
        return found.with_(thresholds=search(ranks, ask, quantity, count_frozen=True))

    def apply(self, xp: Any, delta: Array, place: Place) -> Array:
        if place.key is not None and place.density != 1:
            keep = kept(xp, place.key, place.start, delta, place.density)
            delta = xp.where(keep, delta * rescaling(place), 0)
        return within(xp, delta, place) if self.trimmed else delta


class ByRank(KeepAll):
    """DELLA (arXiv 2406.11617): kept at random, large magnitudes of a row more often, and made up for what is dropped.

    Scalars have no rows and no mask, and are kept.
    """

    rows = True
    fused = False

    def prepare(self, ask: Ask, view: View, found: Findings) -> Findings:
        return _norms(self.params, ask, view, found)

    def apply(self, xp: Any, delta: Array, place: Place) -> Array:
        if not place.columns or place.key is None or place.density == 1:
            return delta
        chance = chances(xp, delta, place)
        keep = hashes(xp, place.key, place.start, delta) < xp.floor(chance * 2.0**32)
        gains = 1 / chance if place.gain is None else place.gain
        return xp.where(keep, delta * xp.asarray(gains, dtype=delta.dtype), 0)


def everywhere(view: View, ranks: Ranks) -> dict[Key, Ranks]:
    """The same ranks in every group of every expert."""
    return {(group, order): ranks for order in view.orders for group in view.group_sizes}


def thresholds(
    ask: Ask, view: View, ranks: Ranks, found: Findings, count_frozen: bool = True
) -> dict[Key, Limits]:
    """The magnitudes at these ranks in every group of every expert, but those that are found already."""
    unknown = {key: rank for key, rank in everywhere(view, ranks).items() if key not in found.thresholds}
    return search(unknown, ask, Quantity(wide=view.wide), count_frozen=count_frozen)


def _norms(params: Params, ask: Ask, view: View, found: Findings) -> Findings:
    """Factors that give every tensor its L1 norm back after a random drop, where that is asked for; 1 where nothing is left."""
    if params.get("rescale") != "l1" or params["density"] == 1:
        return found
    sums = ask(
        Sums((Quantity("magnitude", view.wide, given=found), Quantity("thinned", view.wide, given=found)))
    )
    assert isinstance(sums, Summed)
    gains = {}
    for name, _ in view.combined:
        for order in view.orders:
            whole, left = (sums.total(what, name, order) for what in ("magnitude", "thinned"))
            gains[name, order] = whole / left if left else 1.0
    return found.with_(gains=gains)


def within(xp: Any, delta: Array, place: Place) -> Array:
    """What lies within the thresholds, else zero."""
    size, (low, high) = xp.abs(delta), bounds(place.limits, delta.dtype)
    return xp.where((size >= low) & (size <= high), delta, 0)


def rescaling(place: Place) -> float:
    """What a value that was kept at random is multiplied by."""
    return 1 / place.density if place.gain is None else place.gain


def bounds(limits: Limits, dtype: Any) -> tuple[float, float]:
    """The limits as numbers of the block's own type; those that were found in it are, those that a person wrote are rounded."""
    if str(dtype).endswith("64"):
        return limits.low, limits.high
    return float(np.float32(limits.low)), float(np.float32(limits.high))


def between_ranks(xp: Any, delta: Array, columns: int, ranks: Ranks) -> Array:
    """Breadcrumbs as released (arXiv 2312.06795): of every row the magnitudes between two ranks, thresholds included.

    delta: [rows * columns]. The released code keeps nothing of rows shorter than 1 / density; here one value at least.
    """
    rows = delta.reshape(-1, columns)
    sizes = xp.abs(rows)
    order = _sorted(xp, sizes)
    low, high = ranks(columns)
    keep = sizes >= (0 if low is None else order[:, low - 1 : low])
    if high is not None:
        keep = keep & (sizes <= order[:, high - 1 : high])
    return xp.where(keep, rows, 0).reshape(-1)


def chances(xp: Any, delta: Array, place: Place) -> Array:
    """Probabilities from density - epsilon for the smallest magnitude of a row to density + epsilon for the largest.

    delta: [rows * columns]; float64 of the same shape. Equal magnitudes share the mean of their ranks, so a constant row, or
    a row of one (0 / 0 in the references), has `density` throughout.
    """
    last = place.columns - 1
    if last == 0:
        return xp.asarray(xp.abs(delta) * 0 + place.density, dtype=xp.float64)
    ranks = _mean_ranks(xp, xp.abs(delta).reshape(-1, place.columns))
    return (place.density - place.epsilon) + 2 * place.epsilon * (ranks / last)


def _mean_ranks(xp: Any, sizes: Array) -> Array:
    """The rank from 0 of every element in its row, the mean of the ranks that equals take up; float64, flat."""
    count, columns = sizes.shape
    order = xp.argsort(sizes)
    first = xp.cumsum(xp.ones_like(order[:, :1]), 0) * columns - columns
    where = (order + first).reshape(-1)
    ordered = sizes.reshape(-1)[where].reshape(count, columns)
    starts = xp.ones_like(ordered) > 0
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    begins = xp.where(starts.reshape(-1))[0]
    run = xp.cumsum(starts.reshape(-1), 0) - 1
    ends = xp.concatenate((begins[1:], begins[:1] + count * columns))
    middle = xp.asarray(begins + ends - 1, dtype=xp.float64) / 2
    ranks = xp.empty_like(middle[run])
    ranks[where] = middle[run]
    return (ranks.reshape(count, columns) - xp.asarray(first, dtype=xp.float64)).reshape(-1)


def _sorted(xp: Any, rows: Array) -> Array:
    """Every row in ascending order; torch gives the order as well."""
    found = xp.sort(rows)
    return found[0] if isinstance(found, tuple) else found
