"""The task vector of one expert in a few numbers: how far it moved and where to, without comparing it with every other expert.

A sketch is the sum of the task vector's elements over `WIDTH` buckets with pseudo-random signs. Cosines of sketches are those of the
task vectors up to about 1/sqrt(WIDTH) (count sketch: Charikar, Chen and Farach-Colton, 2002), so copies are found at a cost that does
not grow with the number of experts.

Invariant: numbers are computed in float64 over all float tensors, tied ones once, in grains of fixed size.
"""

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from merge_service.anatomy.structure import anatomy_of
from merge_service.blocks.spans import GRAIN, spans
from merge_service.checkpoints.adapters.opening import open_weights
from merge_service.checkpoints.admission import admit
from merge_service.checkpoints.buffers import buffers
from merge_service.checkpoints.ties import tie

WIDTH = 512
"""Buckets of a sketch."""


@dataclass(frozen=True)
class TaskVector:
    """`norms` are L2 norms by name: `norm` of the whole, `norm.TOWER` of each tower, `norm.largest` of the tensor that moved most.

    `unchanged` is the share of elements that did not move, `sketch` a float32 array [WIDTH].
    """

    norms: Mapping[str, float]
    unchanged: float
    sketch: np.ndarray


def task_vector(base: Path | str, expert: Path | str) -> TaskVector:
    """The task vector of an expert. Raises `CheckpointError` as `admit` does."""
    with open_weights(base) as origin, open_weights(expert, base) as opened:
        tied = tie(origin, [opened])
        admit(origin, opened, "the expert")
        tensors = origin.tensors.items()
        left_out = tied.keys() | buffers(origin)
        sizes = [(name, info.numel) for name, info in tensors if info.kind.is_float and name not in left_out]
        tower = anatomy_of({name: info.shape for name, info in tensors}).tower
        squares, still, sketch = dict.fromkeys((name for name, _ in sizes), 0.0), 0, np.zeros(WIDTH)
        for span in spans(sizes, GRAIN):
            start = origin.read(span.name, span.start, span.stop)
            moved = np.subtract(opened.read(span.name, span.start, span.stop), start, dtype=np.float64)
            squares[span.name] += float(moved @ moved)
            still += int((moved == 0).sum())
            sketch += _sketched(moved, span.name, span.start)
    norms = {"norm": math.sqrt(math.fsum(squares.values()))}
    for side in dict.fromkeys(tower[name] for name in squares):
        inside = [square for name, square in squares.items() if tower[name] == side]
        norms[f"norm.{side}"] = math.sqrt(math.fsum(inside))
    norms["norm.largest"] = math.sqrt(max(squares.values(), default=0.0))
    total = sum(size for _, size in sizes)
    return TaskVector(norms, still / total if total else 1.0, sketch.astype(np.float32))


def unit(sketch: np.ndarray) -> np.ndarray:
    """A sketch of length 1, float32; a zero vector stays one. The product of two of them is their cosine."""
    norm = np.linalg.norm(sketch.astype(np.float64))
    return (sketch / norm if norm else sketch).astype(np.float32)


def _sketched(moved: np.ndarray, name: str, start: int) -> np.ndarray:
    """One grain of a task vector in buckets; signs depend on the tensor's name and the place in it."""
    rng = np.random.default_rng([zlib.crc32(name.encode()), start])
    signs = rng.integers(0, 2, moved.size, np.int8) * 2 - 1
    padded = np.zeros(-(-moved.size // WIDTH) * WIDTH)
    padded[: moved.size] = moved * signs
    rotate = int(rng.integers(0, WIDTH))
    return np.roll(padded.reshape(-1, WIDTH).sum(axis=0), rotate)
