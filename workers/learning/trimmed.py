"""Experts of AdaMerging++: each with its trimmed task vector, as temporary files that the merge engine writes.

Invariant: a trimmed expert is what the merge gives it with coefficient 1 and all others 0, so learning and merge have one definition.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from merge_service.merge import merge
from merge_service.merging import Rules
from merge_service.statistics import COEFFICIENTS, About, write
from workers.learning.wanted import Wanted


@contextlib.contextmanager
def trimmed(wanted: Wanted, base: Path, experts: Sequence[Path]) -> Iterator[Sequence[Path]]:
    """The experts, or trimmed ones for as long as the context lasts."""
    if not wanted.trim:
        yield experts
        return
    with tempfile.TemporaryDirectory(prefix="temporal-merge-") as place:
        made = []
        for number in range(len(experts)):
            alone = Path(place) / f"alone{number}.safetensors"
            unit = np.zeros(len(experts))
            unit[number] = 1
            write(alone, {"*": unit}, About(COEFFICIENTS, {}, 0, technique=wanted.row.technique))
            out = Path(place) / f"expert{number}.safetensors"
            params = {"trim": True, "density": wanted.density}
            ids = [f"e{at}" for at in range(len(experts))]
            merge(
                wanted.row.technique, params, base, experts, out, ids=ids, rules=Rules(any_base=True),
                threads=len(os.sched_getaffinity(0)), measure=False, statistics=[alone] * len(experts),
            )  # fmt: skip
            made.append(out)
        yield made
