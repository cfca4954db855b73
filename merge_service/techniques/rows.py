"""Thinning out a task vector row by row, a row being the last dimension of its tensor.

Blocks come here cut at rows. What is equal within a row is treated alike, so nothing depends on how a sort breaks ties.

Invariant: a row's result depends on that row alone, and on where it lies in its tensor.
"""

from typing import Any

from merge_service.blocks.masks import hashes
from merge_service.blocks.questions import Ranks
from merge_service.techniques.place import Array, Place


def crumbs(xp: Any, delta: Array, columns: int, ranks: Ranks) -> Array:
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


def drop_by_rank(xp: Any, delta: Array, place: Place) -> Array:
    """DELLA (arXiv 2406.11617): keep at random, large magnitudes of a row more often, and make up for what is dropped."""
    if place.key is None or place.density == 1:
        return delta
    chance = chances(xp, delta, place)
    keep = hashes(xp, place.key, place.start, delta) < xp.floor(chance * 2.0**32)
    gains = 1 / chance if place.gain is None else place.gain
    return xp.where(keep, delta * xp.asarray(gains, dtype=delta.dtype), 0)


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
