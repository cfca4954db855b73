"""Where a merged model on disk lies: its distance from the base, and its direction relative to the newest expert's.

A merge computes the same during its pass (`engine.assembly`), without reading anything for it.

Invariant: sums are taken over grains of fixed size and added exactly, so the numbers do not depend on threads.
"""

from dataclasses import asdict
from pathlib import Path

from merge_service.blocks.moments import Geometry, moments
from merge_service.blocks.spans import BLOCK, Scratch, Span, run, spans
from merge_service.checkpoints.adapters.opening import open_weights
from merge_service.checkpoints.admission import admit
from merge_service.checkpoints.buffers import buffers
from merge_service.checkpoints.ties import tie

PathLike = Path | str


def geometry(base: PathLike, merged: PathLike, expert: PathLike, *, threads: int = 1) -> dict[str, float]:
    """Norms of the task vectors of a merged model and of an expert, and the cosine between them.

    {"merged_norm", "expert_norm", "cosine"}, over all float tensors (tied ones once), in float64 and independent of
    blocks and threads. The cosine with a zero vector is 0. Raises `CheckpointError` like `merge`.
    """
    with open_weights(base) as anchor, open_weights(merged) as one, open_weights(expert, base) as two:
        ties, scratch = tie(anchor, [one, two]), Scratch()
        admit(anchor, one, "the merged model")
        admit(anchor, two, "the expert")
        left_out = ties.keys() | buffers(anchor)
        sizes = [(n, i.numel) for n, i in anchor.tensors.items() if i.kind.is_float and n not in left_out]

        def work(span: Span) -> list[tuple[float, float, float]]:
            zero, a, b = (weights.read(span.name, span.start, span.stop) for weights in (anchor, one, two))
            return moments(zero, a, b, scratch)

        parts = run(work, spans(sizes, BLOCK), threads)
    return asdict(Geometry.of([row for part in parts for row in part]))
