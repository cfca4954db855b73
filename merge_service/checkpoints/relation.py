"""Whether an expert can have been trained from a base: how far its matrices lie from the base's.

Fine-tuned experts lie close: |expert - base| / |base| has a median over matrices of .04 to .05 for CLIP models fine-tuned
on one task. Models that were trained apart, or whose units are permuted (the same function), lie at 1.41, as vectors of
equal length without relation do. Their merge is noise, whatever the technique.

Invariant: what is measured is a sample of fixed places, so it does not depend on threads or blocks, and it costs the reading
of at most 16 KB per matrix and model.
"""

import statistics

import numpy as np

from merge_service.checkpoints.checkpoint import Checkpoint
from merge_service.errors import UnrelatedCheckpoint

FAR = 0.5
"""The median from which on an expert is refused: ten times that of a fine-tuned one, a third of an unrelated one."""
APART = 1.0
"""The ratio of a matrix that has nothing of the base's any more."""
SHARE = 0.2
"""Of such matrices, and three or more: permuting only the hidden units of MLPs leaves the median small."""
FAINT = 0.01
"""Of the median size of a number: what lies below was begun next to zero (adapters, zero convolutions), and any step is far."""
SMALLEST = 64
"""Elements of a matrix; fewer say nothing of where it comes from."""
RUN, RUNS = 512, 8


def ratios(base: Checkpoint, expert: Checkpoint) -> list[float]:
    """|expert - base| / |base| of every float matrix, from a sample of at most 4096 elements; not of those that are zero in the
    base, or next to it beside the others."""
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


def check_related(base: Checkpoint, expert: Checkpoint, who: str, whose: str = "the base") -> None:
    """Raise `UnrelatedCheckpoint` naming `who` if it cannot have been trained from `base` (called `whose`)."""
    found = ratios(base, expert)
    if not found:
        return
    median, apart = statistics.median(found), sum(ratio > APART for ratio in found)
    if median <= FAR and apart <= max(2, SHARE * len(found)):
        return
    raise UnrelatedCheckpoint(
        f"{who} ({expert.path}) was not trained from {whose} ({base.path}): |expert - base| / |base| is {median:.2f} in the "
        f"median (matrices: {len(found)}, above {APART:g}: {apart}); fine-tuned experts have about 0.05, and at most {FAR:g} is "
        "taken. Models that were trained apart, or whose units are permuted, give noise when they are merged. Check the base; "
        "if it is meant, --any-base takes it (any_base=True in Python, resources.merging.any_base: true in a study)"
    )


def _places(numel: int) -> list[int]:
    """Where the runs of a sample begin, spread evenly over the tensor."""
    if numel <= RUN * RUNS:
        return list(range(0, numel, RUN))
    return [(numel - RUN) * run // (RUNS - 1) for run in range(RUNS)]
