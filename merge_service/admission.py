"""Whether a checkpoint may take part in a merge: same tensors as its reference, and every number finite.

Nothing is ever skipped, truncated or padded to fit. A merge with a tensor left out looks like a success.
"""

from collections.abc import Collection, Set
from typing import TYPE_CHECKING

import numpy as np

from merge_service.dtypes import all_finite
from merge_service.errors import IncompatibleCheckpoint, NonFiniteCheckpoint

if TYPE_CHECKING:
    from merge_service.checkpoint import Checkpoint

MAX_DIFFERENCES = 10
_SCAN = 1 << 20


def admit(reference: "Checkpoint", candidate: "Checkpoint", who: str) -> tuple[str, ...]:
    """`align` and `check_tensors`: the notes of the first, the errors of the second."""
    notes = align(reference, candidate, who)
    check_tensors(reference, candidate, who)
    return notes


def align(reference: "Checkpoint", candidate: "Checkpoint", who: str) -> tuple[str, ...]:
    """Mend what differs in form alone in `candidate` as it is seen here, and say so: a prefix that all names have (`module.`),
    position numbers that one of them saves and the other does not."""
    return (*_mend_prefix(reference, candidate, who), *_mend_positions(reference, candidate, who))


def check_tensors(reference: "Checkpoint", candidate: "Checkpoint", who: str) -> None:
    """Raise `IncompatibleCheckpoint` naming `who` and at most ten differences in tensors, shapes or kinds of number.

    Float formats may differ (they are summed in float32 or wider), and one number may be [] or [1]; integers must be of the same
    type.
    """
    expected, found = reference.tensors, candidate.tensors
    lacking = position_numbers(reference) - found.keys()
    differences = [f"{name} is missing" for name in expected if name not in found and name not in lacking]
    differences += [f"{name} is not in the reference" for name in found if name not in expected]
    for name in [name for name in expected if name in found]:
        want, have = expected[name], found[name]
        if want.shape != have.shape and not want.numel == have.numel == 1:
            same = ", the same number of values: reshape it" if want.numel == have.numel else ""
            differences.append(f"{name} has shape {list(have.shape)}, not {list(want.shape)}{same}")
        elif want.dtype != have.dtype and not (want.kind.is_float and have.kind.is_float):
            differences.append(f"{name} is {have.dtype}, not {want.dtype}")
    if differences:
        raise IncompatibleCheckpoint(
            f"{who} ({candidate.path}) does not have the tensors of {reference.path}: {_some(differences)}. "
            f"{_hint(list(expected), list(found))}All checkpoints of a merge must come from one architecture"
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


def _mend_prefix(reference: "Checkpoint", candidate: "Checkpoint", who: str) -> list[str]:
    """Read the candidate's names as the reference's where all differ by the same prefix and nothing else."""
    expected, found = (
        set(reference.tensors) - position_numbers(reference),
        set(candidate.tensors) - position_numbers(candidate),
    )
    if not expected or not found or expected == found:
        return []
    for longer, shorter in ((found, expected), (expected, found)):
        prefix = spare_prefix(longer, shorter)
        if prefix:
            old, new = (prefix, "") if longer is found else ("", prefix)
            candidate.rename(old, new)
            done = f"without their prefix {old!r}" if old else f"with the prefix {new!r} that the others have"
            return [f"{who}: its tensor names were read {done}"]
    return []


def spare_prefix(longer: Set[str], shorter: Set[str]) -> str:
    """What stands before all names of `longer` and makes the one difference to `shorter`; "" if there is no such prefix."""
    prefix = _prefix(longer)
    # a model whose own names share their first component has more of it than the wrapper
    for cut in [at + 1 for at, sign in enumerate(prefix) if sign == "."]:
        if {name[cut:] for name in longer} == shorter:
            return prefix[:cut]
    return ""


def _mend_positions(reference: "Checkpoint", candidate: "Checkpoint", who: str) -> list[str]:
    """Leave out position numbers that one of the two has and the other lacks; the output has them as the reference does."""
    extra = [name for name in position_numbers(candidate) if name not in reference.tensors]
    for name in extra:
        del candidate.tensors[name]
    only = {
        **dict.fromkeys(extra, "not in the reference"),
        **dict.fromkeys(position_numbers(reference) - candidate.tensors.keys(), "missing"),
    }
    return [f"{who}: {name} is {what}, but only numbers positions" for name, what in sorted(only.items())]


def position_numbers(checkpoint: "Checkpoint") -> set[str]:
    """Names of buffers that hold 0, 1, 2, ... and that libraries save or not, by their version."""
    return {
        name
        for name, info in checkpoint.tensors.items()
        if name.rpartition(".")[2] == "position_ids"
        and not info.kind.is_float
        and info.numel <= _SCAN
        and np.array_equal(checkpoint.read(name), np.arange(info.numel))
    }


def _prefix(names: Collection[str]) -> str:
    """What all names begin with, whole components only ("module." or "a.b.")."""
    first, last = min(names), max(names)
    size = next((at for at, (a, b) in enumerate(zip(first, last)) if a != b), len(first))
    return first[: first.rfind(".", 0, size) + 1]


def _hint(expected: list[str], found: list[str]) -> str:
    """What to do where names differ by a prefix but not by that alone."""
    old = _prefix(found) or found[0].partition(".")[0] + "." if found else ""
    known = set(expected)
    fitting = sum(name.startswith(old) and name[len(old) :] in known for name in found)
    if old and fitting > len(found) // 2:
        return f"Most names fit without their prefix {old!r}: try --strip-prefix {old}. "
    return ""


def _some(lines: list[str]) -> str:
    more = len(lines) - MAX_DIFFERENCES
    return "; ".join(lines[:MAX_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")
