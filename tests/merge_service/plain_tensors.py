"""The techniques that work on whole tensors, again in plain float64: full SVDs, whole vectors, no streaming state."""

import math
from fractions import Fraction

import numpy as np

NAMES = (
    "nuslerp",
    "multislerp",
    "karcher",
    "model_stock",
    "iso_c",
    "iso_cts",
    "svc_task_arithmetic",
    "opcm",
    "rapf",
    "knots_ties",
)


def merge(technique: str, params: dict, base: dict, experts: list[dict]) -> dict[str, np.ndarray]:
    """Merged float tensors, before logit_scale is clamped."""
    names = [name for name, value in base.items() if value.dtype.kind == "f"]
    wide = [{n: np.asarray(m[n], np.float64) for n in names} for m in (base, *experts)]
    origin, models = wide[0], wide[1:]
    if technique in ("nuslerp", "multislerp", "karcher"):
        anchor = origin if params["space"] == "task_vectors" else {n: np.zeros_like(origin[n]) for n in names}
        return {n: anchor[n] + _turned(technique, params, [m[n] - anchor[n] for m in models]) for n in names}
    if technique == "rapf":
        return {
            n: _by_piece(n, params, _rapf(params), [m[n] for m in models], lambda xs: xs[1]) for n in names
        }
    taus = [{n: m[n] - origin[n] for n in names} for m in models]
    if technique == "opcm":
        delta = _opcm(params, names, taus)
    elif technique == "knots_ties":
        delta = _knots(params, names, taus)
    elif technique == "model_stock":
        delta = {n: _stock(params, [tau[n] for tau in taus]) for n in names}
    elif technique == "svc_task_arithmetic":
        delta = {n: _calibrated(n, params, [tau[n] for tau in taus]) for n in names}
    else:
        solve = _iso if technique == "iso_c" else _iso_tasks(params["common_fraction"])
        delta = {
            n: params["scale"] * _by_piece(n, params, solve, [tau[n] for tau in taus], _mean) for n in names
        }
    return {n: origin[n] + delta[n] for n in names}


def _mean(xs):
    return sum(xs) / len(xs)


def _by_piece(name, params, solve, xs, otherwise):
    averaged = params.get("text_projection") == "mean" and "text_projection" in name
    if xs[0].ndim != 2 or averaged:
        return otherwise(xs)
    rows, columns = xs[0].shape
    split = params["attention"] == "split" and name.endswith("attn.in_proj_weight") and rows == 3 * columns
    pieces = [np.split(x, 3) if split else [x] for x in xs]
    return np.concatenate([solve(list(piece)) for piece in zip(*pieces)])


def _turned(technique, params, xs):
    shape = xs[0].shape
    flat = [x.ravel() for x in xs]
    if "weight" in params:
        weights = np.array([1 - params["weight"], params["weight"]])
    else:
        weights = np.array(params["weights"] or [1.0] * len(xs))
        weights = weights / weights.sum()
    norms = np.array([np.linalg.norm(x) for x in flat])
    line = sum(w * x for w, x in zip(weights, flat)).reshape(shape)
    if flat[0].size == 1 or np.count_nonzero(norms) < 2:
        return line
    units = [x / n for x, n in zip(flat, norms) if n]
    sines = [np.linalg.norm(u - (u @ units[0]) * units[0]) for u in units]
    if max(sines) < 1e-6:
        return line
    if technique == "nuslerp":
        angle = math.acos(np.clip(units[0] @ units[1], -1, 1))
        t = weights[1]
        return (
            (math.sin((1 - t) * angle) * flat[0] + math.sin(t * angle) * flat[1]) / math.sin(angle)
        ).reshape(shape)
    live = weights[norms > 0] / weights[norms > 0].sum()
    mean = sum(w * u for w, u in zip(live, units))
    mean /= np.linalg.norm(mean)
    for _ in range(params.get("iterations", 0) if technique == "karcher" else 0):
        step = np.zeros_like(mean)
        for w, u in zip(live, units):
            cosine = np.clip(u @ mean, -1, 1)
            across = u - cosine * mean
            if np.linalg.norm(across) > 1e-15:
                step += w * math.acos(cosine) * across / np.linalg.norm(across)
        size = np.linalg.norm(step)
        if size < params["tolerance"]:
            break
        mean = math.cos(size) * mean + math.sin(size) * step / size
    return (mean * (weights @ norms)).reshape(shape)


def _stock(params, taus):
    n = len(taus)
    if n == 1:
        return taus[0]
    flat = [tau.ravel() for tau in taus]
    units = [x / np.linalg.norm(x) if np.linalg.norm(x) else x for x in flat]
    cosines = [units[i] @ units[j] for i in range(n) for j in range(i + 1, n)]
    cosine = sum(cosines) / len(cosines)
    t = n * cosine / (1 + (n - 1) * cosine)
    return (t if params["ratio"] == "raw" else min(max(t, 0), 1)) * _mean(taus)


def _svd(matrix):
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    rank = int((values > values[0] * (sum(matrix.shape)) * 1e-7).sum()) if values[0] else 0
    return left[:, :rank], values[:rank], right[:rank]


def _iso(taus):
    left, values, right = _svd(sum(taus))
    return values.mean() * left @ right if len(values) else np.zeros_like(taus[0])


def _iso_tasks(fraction):
    def solve(taus):
        size, count = min(taus[0].shape), len(taus)
        own = min(round((size - int(size * fraction)) / count), size // count)
        if not own:
            return _iso(taus)
        left, values, right = _svd(sum(taus))
        common = size - own * count
        left, values, right = left[:, :common], values[:common], right[:common]
        parts = []
        for tau in taus:
            rest = tau - left @ (left.T @ tau)
            u, s, v = np.linalg.svd(rest, full_matrices=False)
            rank = min(own, int((s > np.linalg.norm(tau) * sum(tau.shape) * 1e-7).sum()))
            parts.append((u[:, :rank], s[:rank], v[:rank]))
        u = np.concatenate([*(p[0] for p in parts), left], axis=1)
        s = np.concatenate([*(p[1] for p in parts), values])
        v = np.concatenate([*(p[2] for p in parts), right])
        return s.mean() * _polar(u) @ _polar(v) if len(s) else np.zeros_like(taus[0])

    return solve


def _polar(matrix):
    left, _, right = _svd(matrix)
    return left @ right


def _calibrated(name, params, taus):
    total = params["scale"] * sum(taus)
    if params["scope"] == "blocks" and ".resblocks." not in f".{name}":
        return total

    def solve(taus):
        delta = params["scale"] * sum(taus)
        left, values, right = _svd(delta)
        out = delta - left @ np.diag(values) @ right
        for u, s, v in zip(left.T, values, right):
            times = 0.0
            for tau in taus:
                own = u @ tau
                there = np.linalg.norm(own) > np.linalg.norm(tau) * sum(tau.shape) * 1e-7
                times += max(params["alpha"], s * (v @ own) / (own @ own) if there else 0)
            out = out + len(taus) / times * s * np.outer(u, v)
        return out

    return _by_piece(name, params, solve, taus, lambda taus: total)


def _rapf(params):
    def solve(pair):
        old, new = pair
        left, values, _ = _svd(old)
        if not len(values):
            return new
        before, after = left.T @ old, left.T @ new
        distance = np.abs(after - before)
        if distance.max() == 0:
            return new
        mask = np.minimum(distance / distance.max() + params["floor"], 1)
        return left @ (mask * after + (1 - mask) * before) + (new - left @ after)

    return solve


def _opcm(params, names, taus):
    total = {n: taus[0][n].copy() for n in names}
    norms = [math.sqrt(sum((tau[n] ** 2).sum() for n in names)) for tau in taus]
    for tau in taus[1:]:
        for n in names:
            held = total[n]

            def solve(pair):
                return _projected(pair[0], pair[1], params["alpha"])

            total[n] = held + _by_piece(n, params, solve, [held, tau[n]], lambda xs: xs[1])
    size = math.sqrt(sum((total[n] ** 2).sum() for n in names))
    length = sum(norms) / len(norms) / size if size else 1.0
    return {n: total[n] * length for n in names}


def _projected(previous, tau, alpha):
    left, values, right = _svd(previous)
    if not len(values):
        return tau
    inner = left.T @ tau @ right.T
    share = np.cumsum(values) / values.sum()
    over = np.flatnonzero(share > alpha)
    leading = int(over[0]) if alpha < 1 and len(over) else len(values)
    drop = np.zeros_like(inner)
    drop[:leading, :leading] = inner[:leading, :leading]
    np.fill_diagonal(drop, np.diag(inner))
    return tau - left @ drop @ right


def _knots(params, names, taus):
    """TIES over coordinates in the left singular vectors of all task vectors side by side; sums that cancel elect nothing."""
    found, by_name = {n: _mean([tau[n] for tau in taus]) for n in names}, {}
    for name in names:
        if taus[0][name].ndim != 2 or (params["scope"] == "blocks" and ".resblocks." not in f".{name}"):
            continue
        pieces = [[tau[name]] for tau in taus]
        if params["attention"] == "split" and name.endswith("attn.in_proj_weight"):
            pieces = [np.split(tau[name], 3) for tau in taus]
        for piece in zip(*pieces):
            left, values, _ = np.linalg.svd(np.concatenate(piece, 1), full_matrices=False)
            left = left[:, values > params["cutoff"]]
            by_name.setdefault(name, []).append((left, [left.T @ tau for tau in piece]))
    rows: dict = {}
    for name, parts in by_name.items():
        image, text = ("visual", "text") if params["granularity"] == "tower" else ("model", "model")
        group = name if params["granularity"] == "tensor" else image if name.startswith("visual.") else text
        rows.setdefault(group, []).append((name, parts))
    for members in rows.values():
        thinned = []
        for at in range(len(taus)):
            sizes = np.sort(np.abs(np.concatenate([c[at].ravel() for _, ps in members for _, c in ps])))
            density = params["density"][at] if isinstance(params["density"], list) else params["density"]
            k = int((1 - Fraction(str(density))) * sizes.size)
            thinned.append(sizes[k - 1] if k else 0.0)
        for name, parts in members:
            made = []
            for left, given in parts:
                kept = np.array([np.where(np.abs(c) >= t * (1 - 1e-6), c, 0) for c, t in zip(given, thinned)])
                signs = np.sign(kept.sum(0))
                agreeing = np.where(np.sign(kept) == signs, kept, 0) * (signs != 0)
                merged = agreeing.sum(0)
                if params["consensus"] == "max":
                    merged = np.abs(agreeing).max(0) * signs
                elif params["consensus"] == "mean":
                    merged = merged / np.maximum((agreeing != 0).sum(0), 1)
                made.append(left @ merged)
            found[name] = np.concatenate(made)
    return {n: params["scale"] * value for n, value in found.items()}
