"""Whether a checkpoint may take part in a merge: the same tensors as its reference, and every number finite.

Nothing is skipped, truncated or padded to fit, because a merge that lacks a tensor looks like a success.
"""

import re
from collections.abc import Collection, Set

import numpy as np

from merge_service.checkpoints.buffers import buffers
from merge_service.checkpoints.dtypes import all_finite
from merge_service.checkpoints.shards import SHARD
from merge_service.checkpoints.weights import Weights
from merge_service.errors import IncompatibleCheckpoint, NonFiniteCheckpoint

MAX_DIFFERENCES = 10
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
_VOCABULARY = re.compile(r"embed|wte|shared|lm_head|vocab|decoder\.(weight|bias)$|predictions")
_SCAN = 1 << 20


def admit(reference: Weights, candidate: Weights, who: str) -> tuple[str, ...]:
    """`align`, then `check_tensors`: returns the notes of the first and raises the errors of the second."""
    notes = align(reference, candidate, who)
    check_tensors(reference, candidate, who)
    return notes


def align(reference: Weights, candidate: Weights, who: str) -> tuple[str, ...]:
    """Adapt `candidate` where it differs only in form, and return notes: a prefix that all names have (`module.`), and buffers
    that only one of the two saves.
    """
    return (*_mend_prefix(reference, candidate, who), *_mend_buffers(reference, candidate, who))


def check_tensors(reference: Weights, candidate: Weights, who: str) -> None:
    """Raise `IncompatibleCheckpoint` naming `who` and at most ten differences in tensors, shapes or kinds of number.

    Float formats may differ (they are summed in float32 or wider), and one number may be [] or [1]; integers must be of the same
    type.
    """
    expected, found = reference.tensors, candidate.tensors
    lacking = buffers(reference, expected.keys() - found.keys())
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
            f"{_hint(reference, candidate)}All checkpoints of a merge must come from one architecture"
        )


def check_finite(candidate: Weights, who: str) -> None:
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


def _mend_prefix(reference: Weights, candidate: Weights, who: str) -> list[str]:
    """Rename the candidate's tensors if all names differ from the reference's by the same prefix and by nothing else."""
    if reference.tensors.keys() == candidate.tensors.keys():
        return []
    expected, found = (set(one.tensors) - buffers(one) for one in (reference, candidate))
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
    """The prefix of all names of `longer` that is their only difference from `shorter`; "" if there is none."""
    prefix = _prefix(longer)
    # the common prefix is longer than the wrapper's if the model's own names share their first component
    for cut in [at + 1 for at, sign in enumerate(prefix) if sign == "."]:
        if {name[cut:] for name in longer} == shorter:
            return prefix[:cut]
    return ""


def _mend_buffers(reference: Weights, candidate: Weights, who: str) -> list[str]:
    """Leave out buffers that only one of the two has, or that differ in form; the output has the reference's."""
    expected, found = reference.tensors, candidate.tensors
    formed = [
        name
        for name in expected.keys() & found.keys()
        if (expected[name].dtype, expected[name].shape) != (found[name].dtype, found[name].shape)
    ]
    only = {
        "not in the reference": buffers(candidate, found.keys() - expected.keys()),
        "of another form than in the reference": buffers(reference, formed) & buffers(candidate, formed),
        "missing": buffers(reference, expected.keys() - found.keys()),
    }
    for name in set().union(*only.values()) & found.keys():
        del candidate.tensors[name]
    return [
        f"{who}: {min(names)}{f' and {len(names) - 1} more' if len(names) > 1 else ''} {what}: computed by the library, not trained"
        for what, names in (
            (f"{'are' if len(names) > 1 else 'is'} {what}", names) for what, names in only.items()
        )
        if names
    ]


def _prefix(names: Collection[str]) -> str:
    """The common prefix of all names, whole components only ("module." or "a.b.")."""
    first, last = min(names), max(names)
    size = next((at for at, (a, b) in enumerate(zip(first, last)) if a != b), len(first))
    return first[: first.rfind(".", 0, size) + 1]


def _hint(reference: Weights, candidate: Weights) -> str:
    """What to do about a known kind of difference."""
    for one in (reference, candidate):
        if SHARD.search(one.path.name) and reference.path != candidate.path:
            return f"{one.path.name} is one of several shards: give their index or their directory. "
    return (
        _hint_of_wrapper(reference, candidate)
        or _hint_of_prefix(list(reference.tensors), list(candidate.tensors))
        or _hint_of_vocabulary(reference, candidate)
    )


def _hint_of_wrapper(reference: Weights, candidate: Weights) -> str:
    for one, other in ((candidate, reference), (reference, candidate)):
        for wrapper in _WRAPPERS:
            bare = {name.replace(wrapper, "") for name in one.tensors}
            if wrapper in "".join(one.tensors) and bare >= other.tensors.keys():
                return (
                    f"{one.path.name} holds names with {wrapper!r}, which training wraps modules in: save it again with names "
                    f"without that (name.replace({wrapper!r}, '')). "
                )
    return ""


def _hint_of_prefix(expected: list[str], found: list[str]) -> str:
    """What to do if names differ by a prefix and by more than that."""
    old = _prefix(found) or found[0].partition(".")[0] + "." if found else ""
    known = set(expected)
    fitting = sum(name.startswith(old) and name[len(old) :] in known for name in found)
    if old and fitting > len(found) // 2:
        return f"Most names fit without their prefix {old!r}: try --strip-prefix {old}. "
    return ""


def _hint_of_vocabulary(reference: Weights, candidate: Weights) -> str:
    """What to do if tokens were added: matrices differ only in their number of rows, all by the same number."""
    pairs = {
        (reference.tensors[name].shape[:1], info.shape[:1])
        for name, info in candidate.tensors.items()
        if name in reference.tensors and reference.tensors[name].shape != info.shape
        if reference.tensors[name].shape[1:] == info.shape[1:] and _VOCABULARY.search(name)
    }
    if len(pairs) != 1:
        return ""
    ((before,), (after,)) = pairs.pop()
    return (
        f"Their vocabularies have {before} and {after} entries: bring all to one before the merge, which must also mean the same "
        "tokens (in transformers: model.resize_token_embeddings(N), then save_pretrained). "
    )


def _some(lines: list[str]) -> str:
    more = len(lines) - MAX_DIFFERENCES
    return "; ".join(lines[:MAX_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")
