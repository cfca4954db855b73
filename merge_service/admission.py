"""Whether a checkpoint may take part in a merge: same tensors as its reference, and every number finite.

Nothing is ever skipped, truncated or padded to fit. A merge with a tensor left out looks like a success.
"""

from typing import TYPE_CHECKING

import numpy as np

from merge_service.dtypes import all_finite
from merge_service.errors import IncompatibleCheckpoint, NonFiniteCheckpoint

if TYPE_CHECKING:
    from merge_service.checkpoint import Checkpoint

MAX_DIFFERENCES = 10
_SCAN = 1 << 20


def admit(reference: "Checkpoint", candidate: "Checkpoint", who: str) -> None:
    """Raise `IncompatibleCheckpoint` naming `who` and at most ten differences in tensors, shapes or kinds of number.

    Float formats may differ (they are summed in float32 or wider); integers must be of the same type.
    """
    expected, found = reference.tensors, candidate.tensors
    differences = [f"{name} is missing" for name in expected if name not in found]
    differences += [f"{name} is not in the reference" for name in found if name not in expected]
    for name in [name for name in expected if name in found]:
        want, have = expected[name], found[name]
        if want.shape != have.shape:
            differences.append(f"{name} has shape {list(have.shape)}, not {list(want.shape)}")
        elif want.dtype != have.dtype and not (want.kind.is_float and have.kind.is_float):
            differences.append(f"{name} is {have.dtype}, not {want.dtype}")
    if differences:
        raise IncompatibleCheckpoint(
            f"{who} ({candidate.path}) does not have the tensors of {reference.path}: {_some(differences)}. "
            "All checkpoints of a merge must come from one architecture"
        )


def check_finite(candidate: "Checkpoint", who: str) -> None:
    """Raise `NonFiniteCheckpoint` naming `who`, the tensors (at most ten) and how many NaN or infinite values each has."""
    bad = []
    for name, info in candidate.tensors.items():
        if not info.kind.is_float:
            continue
        count = 0
        for start in range(0, info.numel, _SCAN):
            block = candidate.read(name, start, start + _SCAN)
            if not all_finite(block):
                count += block.size - int(np.isfinite(block).sum())
        if count:
            bad.append(f"{name} has {count} of {info.numel} values NaN or infinite")
    if bad:
        raise NonFiniteCheckpoint(
            f"{who} ({candidate.path}) cannot be merged: {_some(bad)}. Train or export it again"
        )


def _some(lines: list[str]) -> str:
    more = len(lines) - MAX_DIFFERENCES
    return "; ".join(lines[:MAX_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")
