"""Thinning out one expert's task vector: what is kept, how the rest is compensated, and which ranks bound what is kept.

Each way is an object made of a technique's parameters. It determines which statistics of whole tensors it needs (thresholds,
norms), changes a block, and has the identity under which its thresholds may be kept for the next merge.

Rows are the last dimension of a tensor. A way that works by rows gets blocks that are cut at rows. Equal values of a row are
treated alike, so nothing depends on how a sort breaks ties. A rank counts from 1, the smallest; None is no bound.

Invariant: whether a value is kept depends on its tensor, its expert and its position, never on how tensors are cut into blocks.
"""

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from merge_service.blocks.masks import hashes, kept
from merge_service.blocks.questions import Ask, Findings, Key, Quantity, Ranks, Summed, Sums, Thresholds
from merge_service.blocks.search import search
from merge_service.techniques.params import of_expert
from merge_service.techniques.place import Array, Place, View

Params = Mapping[str, Any]


class KeepAll:
    """Nothing is thinned out. Base of the other ways, which override what differs.

    `rows`: works on whole rows. `fused`: the compiled loops can do it, by thresholds and a mask. `local`: as of `rule.Combining`.
    """

    rows = False
    local = False
    fused = True

    def __init__(self, params: Params) -> None:
        self.params = params

    def prepare(self, ask: Ask, view: View, found: Findings) -> Findings:
        """`found`, and the statistics of whole tensors that `apply` needs."""
        return found

    def apply(self, xp: Any, delta: Array, place: Place) -> Array:
        """A block of a task vector, thinned out."""
        return delta

    def identity(self) -> dict[str, Any] | None:
        """What thresholds depend on besides the expert, the base and the tensors; None if there are none to keep."""
        return None


class _Ranked(KeepAll):
    """Keeps magnitudes between two thresholds, thresholds included."""

    kind = ""
    local = True

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        self.rows = params.get("granularity") == "row"
        self.fused = not self.rows

    def conventional(self, density: float) -> Ranks:
        """The ranks of the thresholds."""
        raise NotImplementedError

    def ranks(self, order: int) -> Ranks:
        """The ranks of the thresholds of an expert."""
        return self.conventional(of_expert(self.params["density"], order))

    def prepare(self, ask: Ask, view: View, found: Findings) -> Findings:
        if self.rows:
            return found
        ranks = {order: self.ranks(order) for order in view.orders}
        unknown = {
            (group, order): ranks[order]
            for order in view.orders
            if ranks[order](10**9) != (None, None)
            for group in view.group_sizes
            if (group, order) not in found.thresholds
        }
        count_frozen = self.params.get("count_frozen", True)
        return found.with_(
            thresholds=search(unknown, ask, Quantity(wide=view.wide), count_frozen=count_frozen)
        )

    def apply(self, xp: Any, delta: Array, place: Place) -> Array:
        if not self.rows:
            return within(xp, delta, place)
        return between_ranks(xp, delta, place.columns, self.ranks(place.order)) if place.columns else delta

    def identity(self) -> dict[str, Any] | None:
        if self.rows or isinstance(self.params["density"], list) or self.ranks(1)(10**9) == (None, None):
            return None
        names = ("density", "outliers", "granularity", "count_frozen", "logit_scale")
        rule = {"kind": self.kind, **{name: self.params[name] for name in names if name in self.params}}
        if rule.get("logit_scale") == "unclamped":
            rule["logit_scale"] = "merge"  # both rank it with the others
        return rule


class TopMagnitudes(_Ranked):
    """TIES (arXiv 2306.01708): the largest magnitudes."""

    kind = "trim"

    def conventional(self, density: float) -> Ranks:
        return trim_ranks(density)


class Band(_Ranked):
    """Breadcrumbs in TIME's convention: without the smallest and the largest magnitudes."""

    kind = "band"

    def conventional(self, density: float) -> Ranks:
        return band_ranks(density, self.params["outliers"])


class Crumbs(_Ranked):
    """Breadcrumbs as released (arXiv 2312.06795), by rows or by groups of tensors."""

    kind = "crumbs"

    def conventional(self, density: float) -> Ranks:
        return crumb_ranks(density, self.params["outliers"])


class AtRandom(KeepAll):
    """DARE (arXiv 2311.03099): kept with probability density and rescaled; then trimmed by magnitude if `trim` is below 1."""

    local = True

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
    """DELLA (arXiv 2406.11617): kept at random, large magnitudes of a row more often, and rescaled.

    Scalars have no rows and no mask, and are kept.
    """

    rows = True
    fused = False
    local = True

    def prepare(self, ask: Ask, view: View, found: Findings) -> Findings:
        return _norms(self.params, ask, view, found)

    def apply(self, xp: Any, delta: Array, place: Place) -> Array:
        if not place.columns or place.key is None or place.density == 1:
            return delta
        chance = chances(xp, delta, place)
        keep = hashes(xp, place.key, place.start, delta) < xp.floor(chance * 2.0**32)
        gains = 1 / chance if place.gain is None else place.gain
        return xp.where(keep, delta * xp.asarray(gains, dtype=delta.dtype), 0)


def trim_ranks(density: float) -> Ranks:
    """TIES: keep |tau| >= the int((1 - density) * n)-th smallest; with nothing to drop, everything.

    The convention of ties-merging and TIME: one more than density * n is kept, and all that tie with the threshold.
    """

    def ranks(n: int) -> tuple[int | None, int | None]:
        return portion(1 - exact(density), n) or None, None

    return ranks


def band_ranks(density: float, outliers: float) -> Ranks:
    """Breadcrumbs in TIME's convention: without ties exactly n - bottom - top are kept, thresholds included."""

    def ranks(n: int) -> tuple[int | None, int | None]:
        bottom = portion(max(1 - exact(density) - exact(outliers), Fraction(0)), n)
        top = portion(exact(outliers), n)
        return (bottom + 1 if bottom else None), (n - top if top else None)

    return ranks


def crumb_ranks(density: float, outliers: float) -> Ranks:
    """Breadcrumbs as released and in MergeKit: without the int(outliers * n) largest, the int(density * n) largest.

    At least one is kept, where the released code keeps nothing and MergeKit loses the whole tensor (outliers * n < 1).
    """

    def ranks(n: int) -> tuple[int | None, int | None]:
        top, keep = portion(exact(outliers), n), max(portion(exact(density), n), 1)
        bottom = n - top - keep
        return (bottom + 1 if bottom > 0 else None), (n - top if top else None)

    return ranks


def exact(number: float) -> Fraction:
    """The decimal as a person wrote it: 0.9 is nine tenths, not the nearest binary fraction, so that 0.9 of 10 is 9."""
    return Fraction(repr(float(number)))


def portion(fraction: Fraction, n: int) -> int:
    """`fraction` of `n`, rounded down."""
    return int(fraction * n)


def everywhere(view: View, ranks: Ranks) -> dict[Key, Ranks]:
    """The same ranks in every group of every expert."""
    return {(group, order): ranks for order in view.orders for group in view.group_sizes}


def thresholds(
    ask: Ask, view: View, ranks: Ranks, found: Findings, count_frozen: bool = True
) -> dict[Key, Thresholds]:
    """The magnitudes at these ranks in every group of every expert, except those in `found`."""
    unknown = {key: rank for key, rank in everywhere(view, ranks).items() if key not in found.thresholds}
    return search(unknown, ask, Quantity(wide=view.wide), count_frozen=count_frozen)


def _norms(params: Params, ask: Ask, view: View, found: Findings) -> Findings:
    """Factors that restore every tensor's L1 norm after a random drop, if requested; 1 if nothing is left."""
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
    """The values within the thresholds, else zero."""
    size, (low, high) = xp.abs(delta), bounds(place.thresholds, delta.dtype)
    return xp.where((size >= low) & (size <= high), delta, 0)


def rescaling(place: Place) -> float:
    """The factor of a value that was kept at random."""
    return 1 / place.density if place.gain is None else place.gain


def bounds(thresholds: Thresholds, dtype: Any) -> tuple[float, float]:
    """The thresholds as numbers of the block's type. Computed thresholds are of that type already; those that a person wrote are
    rounded.
    """
    if str(dtype).endswith("64"):
        return thresholds.low, thresholds.high
    import numpy as np

    return float(np.float32(thresholds.low)), float(np.float32(thresholds.high))


def between_ranks(xp: Any, delta: Array, columns: int, ranks: Ranks) -> Array:
    """Breadcrumbs as released (arXiv 2312.06795): of every row the magnitudes between two ranks, thresholds included.

    delta: [rows * columns]. The released code keeps nothing of rows shorter than 1 / density; here at least one value is kept.
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
