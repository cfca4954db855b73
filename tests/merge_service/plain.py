"""Every technique again, as plainly as in the papers: whole models in float64, one line per step.

It is independent of the implementation (no blocks, no streaming sums, sorting instead of histograms), so that the two can be
compared.
"""

import hashlib
import json
import math
from fractions import Fraction

import numpy as np

from tests.merge_service import plain_tensors

ELECTED = ("ties", "dare_ties", "breadcrumbs_ties")


def merge(
    technique: str, params: dict, base: dict, experts: list[dict], ids: list[str]
) -> dict[str, np.ndarray]:
    """Merged float tensors as float64; the caller handles integers."""
    names = [name for name, value in base.items() if value.dtype.kind == "f"]
    if technique == "average":
        merged = _average(params, names, experts)
    elif technique in plain_tensors.NAMES:
        merged = plain_tensors.merge(technique, params, base, experts)
    elif technique == "slerp":
        merged = {name: _slerp(experts[0][name], experts[1][name], params["weight"]) for name in names}
    else:
        taus = [{n: e[n].astype(np.float64) - base[n].astype(np.float64) for n in names} for e in experts]
        plain = technique.removeprefix("lines_")
        delta = _combine(plain, params, names, taus, ids)
        factor = (
            _depth(names, params) if technique.startswith("lines_") else dict.fromkeys(names, params["scale"])
        )
        merged = {name: base[name].astype(np.float64) + factor[name] * delta[name] for name in names}
    for name in names:
        if name.endswith("logit_scale"):
            ceiling = max(float(np.float32(math.log(100))), float(base[name]))
            merged[name] = np.minimum(merged[name], ceiling)
    return merged


def _average(params, names, experts):
    if "weight" in params:
        weights = [1 - params["weight"], params["weight"]]
    elif params["weights"] is not None:
        weights = params["weights"]
    else:
        grow = {
            "uniform": lambda i: 1,
            "linear": lambda i: i,
            "sqrt": lambda i: i**0.5,
            "quadratic": lambda i: i**2,
            "cubic": lambda i: i**3,
            "exp": lambda i: 2 ** (i - 1),
            "log": lambda i: math.log(i + 1),
        }[params["schedule"]]
        weights = [grow(i) for i in range(1, len(experts) + 1)]
    total = sum(weights)
    return {n: sum(w / total * e[n].astype(np.float64) for w, e in zip(weights, experts)) for n in names}


def _slerp(first, second, weight):
    a, b = first.astype(np.float64).ravel(), second.astype(np.float64).ravel()
    norms = np.linalg.norm(a), np.linalg.norm(b)
    line = (1 - weight) * a + weight * b
    if a.size == 1 or min(norms) < 1e-8:
        return line.reshape(first.shape)
    cosine = a @ b / norms[0] / norms[1]
    if abs(cosine) > 0.9995:
        return line.reshape(first.shape)
    angle = math.acos(cosine)
    arc = (math.sin((1 - weight) * angle) * a + math.sin(weight * angle) * b) / math.sin(angle)
    return arc.reshape(first.shape)


def _combine(technique, params, names, taus, ids):
    if technique == "task_arithmetic":
        return {n: sum(tau[n] for tau in taus) for n in names}
    if technique == "magmax":
        return {n: _latest_largest([tau[n] for tau in taus]) for n in names}
    assert technique in ELECTED
    result = {}
    for members in _groups(names, params["granularity"]):
        rows = np.array([_thinned(technique, params, members, tau, who) for tau, who in zip(taus, ids)])
        flat = _elect(rows, params["consensus"])
        for name in members:
            size = taus[0][name].size
            result[name], flat = flat[:size].reshape(taus[0][name].shape), flat[size:]
    return result


def _latest_largest(arrays):
    best = arrays[0]
    for array in arrays[1:]:
        best = np.where(np.abs(array) >= np.abs(best), array, best)
    return best


def _groups(names, granularity):
    if granularity == "model":
        return [names]
    if granularity == "tensor":
        return [[name] for name in names]
    image = [name for name in names if name.startswith("visual.")]
    return [group for group in (image, [n for n in names if n not in image]) if group]


def _thinned(technique, params, members, tau, who):
    if technique == "dare_ties":
        return np.concatenate([_dropped(tau[n], params["density"], params["seed"], who, n) for n in members])
    row = np.concatenate([tau[n].ravel() for n in members])
    counted = row
    if not params["count_frozen"]:
        counted = np.concatenate([tau[n].ravel() for n in members if tau[n].any()] or [row[:0]])
    order = np.sort(np.abs(counted))
    n, density = order.size, Fraction(str(params["density"]))
    if technique == "ties":
        k = int((1 - density) * n)
        return np.where(np.abs(row) >= order[k - 1], row, 0) if k else row
    outliers = Fraction(str(params["outliers"]))
    bottom, top = int((1 - density - outliers) * n), int(outliers * n)
    if n == 0:
        return row
    keep = (np.abs(row) >= order[bottom] if bottom else True) & (np.abs(row) <= order[n - top - 1])
    return np.where(keep, row, 0)


def _dropped(tau, density, seed, who, name):
    if tau.shape == () or density == 1:
        return tau.ravel()
    key = int.from_bytes(
        hashlib.blake2b(json.dumps([seed, who, name]).encode(), digest_size=8).digest(), "little"
    )
    words = [_splitmix(key, i // 2) >> (32 * (i % 2)) for i in range(tau.size)]
    keep = [word % 2**32 < Fraction(str(density)) * 2**32 for word in words]
    return np.where(keep, tau.ravel() / density, 0)


def _splitmix(key, index):
    z = (key + (index + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def _elect(rows, consensus):
    signs = np.sign(rows.sum(axis=0))
    signs[signs == 0] = np.sign(signs.sum())
    agreeing = np.where(np.sign(rows) == signs, rows, 0) * (signs != 0)
    if consensus == "sum":
        return agreeing.sum(axis=0)
    if consensus == "max":
        return np.abs(agreeing).max(axis=0) * signs
    return agreeing.sum(axis=0) / np.maximum((agreeing != 0).sum(axis=0), 1)


def _depth(names, params):
    def number(name):
        parts = name.split(".")
        return int(parts[parts.index("resblocks") + 1]) if "resblocks" in parts else None

    shape = {"linear": 1, "quadratic": 2, "sqrt": 0.5}[params["lines_shape"]]
    factors = {}
    for name in names:
        tower = [n for n in names if n.startswith("visual.") == name.startswith("visual.")]
        last = max((number(n) for n in tower if number(n) is not None), default=0)
        here = number(name)
        growth = 0 if here is None or last == 0 else (here / last) ** shape
        factors[name] = params["lines_alpha"] + params["lines_beta"] * growth
    return factors
