"""Statistics of toy checkpoints, beside them: drawn from the content of the weights, so that equal experts have equal ones."""

import zlib
from pathlib import Path

import numpy as np

from merge_service import techniques
from merge_service.anatomy.linear import linear_of
from merge_service.checkpoints import Checkpoint
from merge_service.checkpoints.ties import recorded
from merge_service.statistics import About, beside, write
from merge_service.techniques.families import importance, learned, matching, regression, subspaces

GIVEN = tuple(name for name in techniques.names() if not techniques.get(name).learned)
"""Techniques that need no file that was learned for all experts together; those that do are tested in `statistics/test_learned.py`."""
BY_GOLDEN = {
    one.name for family in (subspaces, regression, importance, matching, learned) for one in family.TECHNIQUES
} | {"knots_ties"}
"""Techniques whose second version are the golden vectors of `statistics/test_golden_data.py`."""


def of_technique(name: str, path: Path) -> Path:
    """Write what a technique needs of the checkpoint at `path`, as a rule with default parameters; returns `path`."""
    technique = techniques.get(name)
    form = "merge" if "merge" in technique.forms else "fold"
    asked = technique.asked(technique.resolve({}, form))
    if asked is not None:
        save(asked.kind, path)
    return path


def save(kind: str, path: Path, out: Path | None = None, **about) -> Path:
    """Statistics of a kind beside the checkpoint, or at `out`, for every tensor that has any."""
    tensors = {}
    with Checkpoint.open(path) as weights:
        again = recorded(weights)  # a tensor has its statistics under one of its names
        for name, info in weights.tensors.items():
            if info.kind.is_float and info.numel and name not in again:
                rng = np.random.default_rng(
                    [zlib.crc32(weights.read(name).tobytes()), zlib.crc32(name.encode())]
                )
                found = _drawn(kind, name, tuple(info.shape), rng)
                tensors |= {f"{name}{suffix}": one for suffix, one in found.items()}
    out = out or beside(path, kind)
    rows = {name: 8 for name in tensors if not name.endswith(":out")}
    write(out, tensors, About(kind, rows, 8, **about))
    return out


def _drawn(kind: str, name: str, shape: tuple[int, ...], rng: np.random.Generator) -> dict[str, np.ndarray]:
    if kind in ("fisher", "gradient"):
        return {"": rng.integers(1, 64, shape) / 64.0}
    linear = linear_of(name, shape)
    if linear is None:
        return {}
    if linear.diagonal:
        return {"": rng.integers(1, 64, linear.inputs) / 64.0} if kind == "gram" else {}
    x = rng.integers(-8, 9, (3 * linear.inputs, linear.inputs)) / 8.0
    inner = x.T @ x / len(x)
    if kind in ("gram", "layer_gram"):
        return {"": inner}
    g = rng.integers(-8, 9, (3 * linear.outputs, linear.outputs)) / 8.0
    return {"": inner, ":out": g.T @ g / len(g)}
