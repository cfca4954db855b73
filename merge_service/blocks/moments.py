"""Where a merged model lies, as sums over its blocks: how far from the base, and how far in the direction of the newest expert.

Invariant: sums are taken in float64 over grains of fixed size and added up exactly, so the numbers do not depend on blocks, threads or
processes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from merge_service.blocks.spans import Scratch, dots

Moments = Sequence[Sequence[float]]
"""Per grain: the sums of (merged - base)^2, (expert - base)^2 and of their product; the last two are 0 where they are not asked for."""


@dataclass(frozen=True)
class Geometry:
    """L2 norms of two task vectors and the cosine between them, which is 0 with a zero vector."""

    merged_norm: float
    expert_norm: float
    cosine: float

    @classmethod
    def of(cls, moments: Moments) -> "Geometry":
        """From the moments of all blocks, in any order."""
        aa, bb, ab = (math.fsum(row[i] for row in moments) for i in range(3))
        norms = math.sqrt(aa), math.sqrt(bb)
        cosine = ab / (norms[0] * norms[1]) if norms[0] and norms[1] else 0.0
        return cls(*norms, max(-1.0, min(1.0, cosine)))


def moments(
    base: np.ndarray, merged: np.ndarray, expert: np.ndarray | None, scratch: Scratch
) -> list[tuple[float, float, float]]:
    """The moments of one block, which must start at a whole grain."""
    a = np.subtract(merged, base, dtype=np.float64)
    if expert is None:
        return [(part, 0.0, 0.0) for part in dots(a, a, scratch)]
    b = np.subtract(expert, base, dtype=np.float64)
    return list(zip(dots(a, a, scratch), dots(b, b, scratch), dots(a, b, scratch)))
