"""Where a merged model lies: how far from the base, and how far in the direction of the newest expert.

Invariant: sums are taken over grains of fixed size and added up exactly, so the numbers do not depend on threads.
"""

import math
from pathlib import Path

import numpy as np

from merge_service.blocks.spans import BLOCK, Scratch, Span, dots, run, spans
from merge_service.checkpoints.admission import admit
from merge_service.checkpoints.buffers import buffers
from merge_service.checkpoints.checkpoint import Checkpoint
from merge_service.checkpoints.ties import tie

PathLike = Path | str


def geometry(base: PathLike, merged: PathLike, expert: PathLike, *, threads: int = 1) -> dict[str, float]:
    """Norms of the task vectors of a merged model and of an expert, and the cosine between them.

    {"merged_norm", "expert_norm", "cosine"}, over all float tensors (tied ones once), in float64 and independent of
    blocks and threads. The cosine with a zero vector is 0. Raises `CheckpointError` like `merge`.
    """
    with Checkpoint.open(base) as anchor, Checkpoint.open(merged) as one, Checkpoint.open(expert) as two:
        ties, scratch = tie(anchor, [one, two]), Scratch()
        admit(anchor, one, "the merged model")
        admit(anchor, two, "the expert")
        left_out = ties.keys() | buffers(anchor)
        sizes = [(n, i.numel) for n, i in anchor.tensors.items() if i.kind.is_float and n not in left_out]

        def work(span: Span) -> tuple[list[float], list[float], list[float]]:
            zero = anchor.read(span.name, span.start, span.stop)
            a = np.subtract(one.read(span.name, span.start, span.stop), zero, dtype=np.float64)
            b = np.subtract(two.read(span.name, span.start, span.stop), zero, dtype=np.float64)
            return dots(a, a, scratch), dots(b, b, scratch), dots(a, b, scratch)

        parts = run(work, spans(sizes, BLOCK), threads)
    aa, bb, ab = (math.fsum(x for part in parts for x in part[i]) for i in range(3))
    norms = math.sqrt(aa), math.sqrt(bb)
    cosine = ab / (norms[0] * norms[1]) if norms[0] and norms[1] else 0.0
    return {"merged_norm": norms[0], "expert_norm": norms[1], "cosine": max(-1.0, min(1.0, cosine))}
