"""Further data-free techniques again, written as plainly as in their papers: whole models in float64.

Companion of `plain.py` and independent of the implementation: no blocks, no streaming sums, sorting instead of histograms. Where
the references disagree or fail, the function says what it does instead.
"""

import hashlib
import itertools
import json
import math
from fractions import Fraction

import numpy as np

from tests.merge_service import plain

TECHNIQUES = (
    "breadcrumbs", "dare", "dare_ties", "della", "della_linear", "sce", "ram", "nearswap", "random_mix", "consensus",
    "pcb", "wise_ft",
)  # fmt: skip
ELECTED = ("dare_ties", "della")


def merge(
    technique: str, params: dict, base: dict, experts: list[dict], ids: list[str]
) -> dict[str, np.ndarray]:
    """Merged float tensors as float64; the caller handles integers. Without experts, the base.

    Techniques that are not here are in `plain.py`.
    """
    if technique not in TECHNIQUES:
        return plain.merge(technique, params, base, experts, ids)
    names = [name for name, value in base.items() if value.dtype.kind == "f"]
    start = {n: base[n].astype(np.float64) for n in names}
    thetas = [{n: expert[n].astype(np.float64) for n in names} for expert in experts]
    if not experts:
        merged = start
    elif technique == "nearswap":
        merged = {n: nearswap(thetas[0][n], thetas[1][n], params["threshold"]) for n in names}
    elif technique == "wise_ft":
        w = params["weight"]
        merged = {n: (1 - w) * start[n] + w * sum(theta[n] for theta in thetas) / len(thetas) for n in names}
    else:
        taus = [{n: theta[n] - start[n] for n in names} for theta in thetas]
        delta = _combine(technique, params, names, taus, ids)
        merged = {n: start[n] + params["scale"] * delta[n] for n in names}
    for name in names:
        if name.endswith("logit_scale"):
            ceiling = max(float(np.float32(math.log(100))), float(base[name]))
            merged[name] = np.minimum(merged[name], ceiling)
    return merged


def _combine(technique, params, names, taus, ids):
    if technique == "random_mix":
        return {n: random_mix([t[n] for t in taus], params["seed"], ids, n) for n in names}
    if technique == "breadcrumbs":
        taus = [breadcrumbs(params, names, tau) for tau in taus]
    elif technique in ("dare", "dare_ties", "della", "della_linear"):
        taus = [{n: dropped(tau[n], params, who, n) for n in names} for tau, who in zip(taus, ids)]
    if params.get("trim", 1) < 1:
        taus = [trimmed(params, names, tau) for tau in taus]
    result = {}
    for members in plain._groups(names, grouped_by(params)):
        rows = np.array([_flat(tau, members) for tau in taus])
        result |= _unflat(_join(technique, params, rows), members, taus[0])
    return result


def grouped_by(params):
    """What is combined together: rows are combined within their tensor, and where nothing asks, so is everything."""
    granularity = params.get("granularity", "tensor")
    return "tensor" if granularity == "row" else granularity


def _join(technique, params, rows):
    if technique in ELECTED:
        return plain._elect(rows, params["consensus"])
    if technique == "sce":
        return sce(rows, params["density"], params["erase_unselected"])
    if technique == "ram":
        return ram(rows, params["threshold"])
    if technique == "consensus":
        return consensus(rows, params["tall_lambda"], params["min_tasks"])
    if technique == "pcb":
        return pcb(rows, params["density"], params["winsorize"], params["inter_balance"])
    return rows.sum(axis=0)


def _flat(tau, members):
    return np.concatenate([tau[n].ravel() for n in members])


def _unflat(flat, members, like):
    ends = np.cumsum([like[n].size for n in members])
    return {n: part.reshape(like[n].shape) for n, part in zip(members, np.split(flat, ends[:-1]))}


def breadcrumbs(params, names, tau):
    """Without the largest `outliers` of n magnitudes, the largest `density` of n; rows of the last dimension or groups.

    Counts as in the released code and in MergeKit, which then keep an arbitrary one of equal magnitudes; here all that equal a
    threshold stay. Of a short row they keep none; here at least one. Scalars stay whole in rows.
    """
    if params["granularity"] == "row":
        return {n: band(tau[n], tau[n], params) if tau[n].ndim else tau[n] for n in names}
    kept = {}
    for members in plain._groups(names, params["granularity"]):
        moved = [n for n in members if params["count_frozen"] or tau[n].any()]
        flat = _flat(tau, members)
        kept |= _unflat(band(flat, _flat(tau, moved) if moved else flat, params), members, tau)
    return kept


def band(values, counted, params):
    """`values` within the band of magnitudes that `counted` has along its last dimension, else 0."""
    n = counted.shape[-1]
    top = int(Fraction(str(params["outliers"])) * n)
    keep = max(int(Fraction(str(params["density"])) * n), 1)
    order = np.sort(np.abs(counted), axis=-1)
    low, high = order[..., n - top - keep, None], order[..., n - top - 1, None]
    return np.where((np.abs(values) >= low) & (np.abs(values) <= high), values, 0)


def dropped(tau, params, who, name):
    """DARE and DELLA: kept at random, each by its own probability, and rescaled for what is dropped.

    `expectation` divides by the probability (papers, MergeLM, FusionBench, TIME, DELLA's code); `l1` restores the tensor's L1
    norm (MergeKit). Scalars and density 1 stay whole.
    """
    if tau.ndim == 0 or params["density"] == 1:
        return tau
    chance = chances(tau, params["density"], params.get("epsilon", 0))
    kept = np.where(hashes(tau.size, params["seed"], who, name) < np.floor(chance.ravel() * 2.0**32), 1, 0)
    kept = kept.reshape(tau.shape)
    if params["rescale"] == "expectation":
        return kept * tau / chance
    left = np.abs(kept * tau).sum()
    return kept * tau * (np.abs(tau).sum() / left if left else 1)


def chances(tau, density, epsilon):
    """Keep probabilities, growing with the rank of a magnitude in its row from density - epsilon to density + epsilon.

    Equal magnitudes share the mean of their ranks, so a constant row, or a row of one, has `density` throughout (the
    references give equals different ranks, and 0/0 for a row of one).
    """
    rank, last = np.apply_along_axis(_ranks, -1, np.abs(tau)), tau.shape[-1] - 1
    place = rank / last if last else np.full(tau.shape, 0.5)
    return (density - epsilon) + 2 * epsilon * place


def _ranks(row):
    _, which, equal = np.unique(row, return_inverse=True, return_counts=True)
    return (np.cumsum(equal) - equal + (equal - 1) / 2)[which]


def hashes(size, seed, who, name):
    """The 32-bit hash of every element."""
    text = json.dumps([seed, who, name]).encode()
    key = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    words = np.array([plain._splitmix(key, i) for i in range((size + 1) // 2)], np.uint64)
    return np.stack([words & np.uint64(0xFFFFFFFF), words >> np.uint64(32)]).T.ravel()[:size]


def trimmed(params, names, tau):
    """TIES' trim after a random drop, as in FusionBench and MergeLM: zeros count."""
    rule = {"density": params["trim"], "count_frozen": True}
    kept = {}
    for members in plain._groups(names, params["granularity"]):
        kept |= _unflat(plain._thinned("ties", rule, members, tau, None), members, tau)
    return kept


def random_mix(taus, seed, ids, name):
    """Per element the expert whose hash is largest; of equal hashes (one in 2^32) the larger value."""
    draws = np.array([hashes(tau.size, seed, who, name) for tau, who in zip(taus, ids)])
    values = np.array([tau.ravel() for tau in taus])
    mixed = [max(zip(draws[:, i], values[:, i]))[1] for i in range(values.shape[1])]
    return np.array(mixed, np.float64).reshape(taus[0].shape)


def nearswap(first, second, threshold):
    """Interpolated from first to second by min(1, threshold / |first - second|)."""
    apart = np.abs(first - second)
    weight = threshold / np.where(apart > threshold, apart, 1)
    return np.where(apart <= threshold, second, (1 - weight) * first + weight * second)


def sce(rows, density, erase_unselected):
    """Select the positions with most variance over experts, weigh experts by energy there, erase the minority direction.

    Positions not selected stay at the base in MergeKit; in FuseAI's code they only do not count in the weights. A group in which
    experts do not differ is selected whole (in MergeKit one expert gives the base), of others at least one position. Votes that
    cancel go to plus. MergeKit weighs all alike below a mean square of 1e-6, where most fine-tuning lies.
    """
    variance = np.ravel(sum((a - b) ** 2 for a, b in itertools.combinations(rows, 2)))
    differing = np.sort(variance[variance > 0])
    selected = rows
    if density < 1 and differing.size:
        keep = max(int(Fraction(str(density)) * differing.size), 1)
        selected = np.where(variance >= differing[-keep], rows, 0)
    energy = (selected**2).sum(axis=1, keepdims=True)
    moved = selected if erase_unselected else rows
    elected = np.where(moved.sum(axis=0) >= 0, 1, -1)
    weights = energy * (np.sign(moved) == elected)
    total = weights.sum(axis=0)
    return (weights * moved).sum(axis=0) / np.where(total == 0, 1, total)


def ram(rows, threshold):
    """Mean over the experts that changed an element."""
    changed = np.abs(rows) > threshold
    return (rows * changed).sum(axis=0) / np.maximum(changed.sum(axis=0), 1)


def tall_masks(rows, tall_lambda):
    """Which experts use which element: where they moved further than `tall_lambda` times their way to the sum."""
    return np.abs(rows) > tall_lambda * np.abs(rows.sum(axis=0) - rows)


def consensus(rows, tall_lambda, min_tasks):
    """The sum of task vectors where at least `min_tasks` experts use the element."""
    return np.where(tall_masks(rows, tall_lambda).sum(axis=0) >= min_tasks, rows.sum(axis=0), 0)


def pcb(rows, density, winsorize, inter_balance):
    """A mean weighted by importance within a task vector and agreement between them.

    Agreement is tanh(tau_i * sum of tau_j) in pcb-merging.py (`sum`), the sum of tanh over pairs of task vectors scaled to
    -1..1 in the vision code with search (`pairs`). Where all magnitudes, or all scores, are equal the references divide
    by zero: here importance is then the same for all, and of equal scores the positive ones count alike.
    """
    n, size = rows.shape
    bottom = int(size * Fraction(str(winsorize)))
    top = max(
        int(size * (1 - Fraction(str(winsorize))) - 1), bottom
    )  # below the last even at winsorize 0+, as published
    order = np.sort(np.abs(rows), axis=1)
    low, high = order[:, bottom, None], order[:, top, None]
    clamped = np.sign(rows) * np.clip(np.abs(rows), low, high)
    within = _spread(np.clip(np.abs(rows), low, high), low, high)
    if inter_balance == "sum":
        between = np.tanh(rows * rows.sum(axis=0))
    else:
        signed = np.sign(rows) * within
        between = np.array([np.tanh(one * signed).sum(axis=0) for one in signed])
    score = np.exp(n * (within**2 - 1)) * between
    order = np.sort(score, axis=1)
    least = order[:, min(int(size * (1 - Fraction(str(density)))), size - 1), None]
    most = order[:, -1, None]
    share = np.where((most == least) & (score == most) & (score > 0), 1, _spread(score, least, most))
    return (share * clamped).sum(axis=0) / np.maximum(share.sum(axis=0), 1e-12)


def _spread(values, low, high):
    """Clamped to low..high and mapped to 0..1; all zero if low equals high."""
    return (np.clip(values, low, high) - low) / np.where(high > low, high - low, 1)
