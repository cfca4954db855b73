"""Whether an expert can have been trained from a base, by the distance of its matrices from the base's.

Fine-tuned experts are close: |expert - base| / |base| has a median over matrices of .04 to .05 for CLIP models fine-tuned on one
task. Models that were trained separately, or whose units are permuted (the same function), are at 1.41, like unrelated vectors of
equal length. Their merge is noise with any technique.

Invariant: the sample has fixed places, so the result does not depend on threads or blocks; it reads at most 16 KB per matrix and
model.
"""

import statistics

import numpy as np

from merge_service.checkpoints.weights import Weights
from merge_service.errors import UnrelatedCheckpoint

FAR = 0.5
"""The median above which an expert is refused: ten times that of a fine-tuned one, a third of an unrelated one."""
APART = 1.0
"""The ratio above which a matrix has nothing in common with the base's."""
SHARE = 0.2
"""Fraction of such matrices (and at least three) above which an expert is refused: permuting only the hidden units of MLPs leaves
the median small.
"""
FAINT = 0.01
"""Fraction of the median magnitude below which a matrix is left out: it started near zero (adapters, zero convolutions), so any
step is far.
"""
SMALLEST = 64
"""Least elements of a matrix that is compared; fewer tell nothing about its origin."""
RUN, RUNS = 512, 8


def ratios(base: Weights, expert: Weights) -> list[float]:
    """|expert - base| / |base| of every float matrix, from a sample of at most 4096 elements. Matrices that are zero in the base,
    or near zero compared with the others, are left out.
    """
    found, sizes = [], []
    for name, info in base.tensors.items():
        if (
            not info.kind.is_float
            or len(info.shape) < 2
            or info.numel < SMALLEST
            or name not in expert.tensors
        ):
            continue
        start, moved, seen = 0.0, 0.0, 0
        for at in _places(info.numel):
            one = base.read(name, at, at + RUN).astype(np.float64)
            other = expert.read(name, at, at + RUN).astype(np.float64)
            start += float(one @ one)
            with np.errstate(invalid="ignore"):
                moved += float((other - one) @ (other - one))
            seen += one.size
        if start > 0 and np.isfinite(start + moved):
            found.append(float(np.sqrt(moved / start)))
            sizes.append(float(np.sqrt(start / seen)))
    least = FAINT * statistics.median(sizes) if sizes else 0.0
    return [ratio for ratio, size in zip(found, sizes) if size >= least]


def check_related(base: Weights, expert: Weights, who: str, whose: str = "the base") -> None:
    """Raise `UnrelatedCheckpoint` naming `who` if it cannot have been trained from `base` (called `whose` in the message)."""
    found = ratios(base, expert)
    if not found:
        return
    median, apart = statistics.median(found), sum(ratio > APART for ratio in found)
    if median <= FAR and apart <= max(2, SHARE * len(found)):
        return
    raise UnrelatedCheckpoint(
        f"{who} ({expert.path}) was not trained from {whose} ({base.path}): |expert - base| / |base| is {median:.2f} in the "
        f"median (matrices: {len(found)}, above {APART:g}: {apart}); fine-tuned experts have about 0.05, and at most {FAR:g} is "
        "accepted. Models that were trained separately, or whose units are permuted, give noise when they are merged. Check the "
        "base; to merge them nevertheless, give --any-base (any_base=True in Python, resources.merging.any_base: true in a study)"
    )


def _places(numel: int) -> list[int]:
    """Where the runs of a sample begin, spread evenly over the tensor."""
    if numel <= RUN * RUNS:
        return list(range(0, numel, RUN))
    return [(numel - RUN) * run // (RUNS - 1) for run in range(RUNS)]
