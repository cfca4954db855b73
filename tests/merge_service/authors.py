"""Merging as the authors of TIME define it, implemented from a description: whole towers as vectors, in numpy alone.

Nothing of the package is used, and the terms are the authors': `prune` is the dropped fraction, a pair is [new, running], and
SLERP's coefficient applies to the second of the two.
"""

import math

import numpy as np

Model = dict[str, np.ndarray]


def merge(method: str, options: dict, base: Model, models: list[Model]) -> Model:
    """The merged models (a pair: newest first), each tower separately and anchored at the base."""
    merged: Model = {}
    for names in towers(base):
        if method == "interpolation":
            weights = options.get("coefficients") or [1 / len(models)] * len(models)
            assert math.isclose(sum(weights), 1, abs_tol=1e-6)
            merged |= {n: sum(np.float32(w) * m[n] for w, m in zip(weights, models)) for n in names}
        elif method == "slerp":
            t = options.get("t", 0.5)
            merged |= {n: slerp(models[0][n], models[1][n], t) for n in names}
        elif method == "model_stock":
            merged |= {n: stock(base[n], models[0][n], models[1][n]) for n in names}
        else:
            start = flat(base, names)
            taus = np.stack([flat(m, names) - start for m in models])
            factor = lines(base, names, options["lines"]) if "lines" in options else options.get("scale", 1)
            merged |= apart(start + np.float32(factor) * combine(method, options, taus), base, names)
    return merged


def fold(method: str, options: dict, base: Model, experts: list[Model], start_at_base: bool) -> Model:
    """The unrolled merge: the newest expert and the running model, one expert after the other."""
    running, *rest = [base, *experts] if start_at_base else experts
    for newest in rest:
        running = merge(method, options, base, [newest, running])
    return running


def towers(model: Model) -> list[list[str]]:
    image = [name for name in model if name.startswith("visual.")]
    return [image, [name for name in model if name not in image]]


def flat(model: Model, names: list[str]) -> np.ndarray:
    return np.concatenate([model[name].ravel() for name in names])


def apart(vector: np.ndarray, like: Model, names: list[str]) -> Model:
    sizes = np.cumsum([like[name].size for name in names])[:-1]
    return {n: part.reshape(like[n].shape) for n, part in zip(names, np.split(vector, sizes))}


def slerp(v0: np.ndarray, v1: np.ndarray, t: float) -> np.ndarray:
    cosine = float((v0 / np.linalg.norm(v0) * (v1 / np.linalg.norm(v1))).sum())
    if abs(cosine) > 0.9995:
        return np.float32(1 - t) * v0 + np.float32(t) * v1
    angle = math.acos(cosine)
    first, second = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    return np.float32(first) * v0 + np.float32(second) * v1


def stock(base: np.ndarray, one: np.ndarray, two: np.ndarray, eps: float = 1e-8) -> np.ndarray:
    a, b = one - base, two - base
    cosine = float((a * b).sum()) / (math.sqrt((a * a).sum() * (b * b).sum()) + eps)
    ratio = 2 * cosine / (1 + cosine + eps)
    return np.float32(ratio) * ((one + two) / 2) + np.float32(1 - ratio) * base


def lines(base: Model, names: list[str], params: tuple[float, float, str]) -> np.ndarray:
    """Per element alpha outside blocks, alpha + beta (l / (L - 1))^s in block l of a tower with L blocks."""
    alpha, beta, shape = params
    power = {"linear": 1, "quadratic": 2, "sqrt": 0.5}[shape]
    block = {n: int(n.split(".resblocks.")[1].split(".")[0]) for n in names if ".resblocks." in n}
    deepest = max(block.values())
    factors = [alpha + beta * (block[n] / deepest) ** power if n in block else alpha for n in names]
    return np.concatenate([np.full(base[n].size, f, np.float32) for n, f in zip(names, factors)])


def combine(method: str, options: dict, taus: np.ndarray) -> np.ndarray:
    if method == "task_arithmetic":
        return taus.sum(axis=0)
    if method == "magmax":
        return taus[np.abs(taus).argmax(axis=0), np.arange(taus.shape[1])]
    if method == "tall_masks":
        total = taus.sum(axis=0)
        users = np.abs(taus) > np.abs(total - taus) * np.float32(options.get("lambda", 0.4))
        return total * (users.sum(axis=0) >= options.get("threshold", 0))
    thin = {"ties": trimmed, "breadcrumbs_ties": banded, "given": lambda tau, options: tau}[method]
    kept = np.stack([thin(tau, options) for tau in taus])
    return disjoint(kept, elected(kept), options.get("function", "mean"))


def trimmed(tau: np.ndarray, options: dict) -> np.ndarray:
    k = int(tau.size * options["prune"])
    return np.where(np.abs(tau) >= np.sort(np.abs(tau))[k - 1], tau, 0)


def banded(tau: np.ndarray, options: dict) -> np.ndarray:
    bottom, top = int(options["prune"] * tau.size), int(options["top"] * tau.size)
    size = np.sort(np.abs(tau))
    return np.where((np.abs(tau) >= size[bottom]) & (np.abs(tau) <= size[-top - 1]), tau, 0)


def elected(rows: np.ndarray) -> np.ndarray:
    signs = np.sign(rows.sum(axis=0))
    return np.where(signs == 0, np.sign(signs.sum()), signs)


def disjoint(rows: np.ndarray, signs: np.ndarray, function: str) -> np.ndarray:
    chosen = np.where(np.where(signs > 0, rows > 0, rows < 0), rows, 0)
    if function == "max":
        return np.abs(chosen).max(axis=0) * signs
    total = chosen.sum(axis=0)
    count = (
        np.float32(1) if function == "sum" else np.maximum((chosen != 0).sum(axis=0), 1).astype(np.float32)
    )
    return total / count
