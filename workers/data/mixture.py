"""The samples of each training batch: pure index arithmetic without state.

The shares follow FoMo-in-Flux v1.0 (arXiv 2408.14471), which TIME uses. A batch of 512 at .33/.34/.33 has 169 samples of the
pretraining pool, 175 of the current task and 168 of the buffer of earlier tasks. While the buffer is empty, its share is split
equally among the others, which gives 253 + 259. Each source is traversed in seeded permutations, so no sample is repeated before all
were used.
Invariant: the indices of a step depend on (seed, step, batch size, mixture, sizes) only; a run resumed at step k continues exactly.
"""

from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from merge_service.errors import UserError

SOURCES = ("pretraining", "update", "buffer")
MAX_BATCH = 100_000
"""The limit of the search for a sufficient batch size."""


def batch_counts(batch_size: int, mixture: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, int]:
    """The number of samples of each source in a batch; they sum to `batch_size`.

    `mixture` holds shares that sum to 1, `sizes` the number of samples of each source. Shares are rounded down; the remainder goes
    to the sources in order, pretraining first. The share of an empty buffer is split equally among the other sources in use.
    Raises UserError if another source with a share has no samples, or if a share rounds to no sample of a batch.
    """
    if abs(sum(mixture.get(name, 0.0) for name in SOURCES) - 1) > 1e-6 or set(mixture) - set(SOURCES):
        raise UserError(f"mixture {dict(mixture)}: the shares of {', '.join(SOURCES)} must sum to 1")
    used = [name for name in SOURCES if mixture.get(name, 0.0) > 0]
    for name in used:
        if name != "buffer" and not sizes.get(name, 0):
            raise UserError(
                f"the mixture takes {mixture[name]:g} of each batch from {name!r}, which holds no samples"
            )
    counts = _counts(batch_size, mixture, buffered=sizes.get("buffer", 0) > 0)
    if problem := lost_shares(batch_size, mixture, buffered=sizes.get("buffer", 0) > 0):
        raise UserError(f"the mixture {problem}")
    return counts


def lost_shares(
    batch_size: int, mixture: Mapping[str, float], buffered: bool, multiple: int = 1
) -> str | None:
    """The problem with a batch size at which some share rounds to no sample, with a sufficient size; None if there is none.

    `buffered` is whether there are earlier tasks to replay. The suggested size is a multiple of `multiple`.
    """
    used = [name for name in SOURCES if mixture.get(name, 0.0) > 0 and (buffered or name != "buffer")]

    def lost(size: int) -> list[str]:
        counts = _counts(size, mixture, buffered)
        return [name for name in used if not counts[name]]

    names = lost(batch_size)
    if not names:
        return None
    counts = _counts(batch_size, mixture, buffered)
    parts = ", ".join(f"{name} {mixture[name]:g} = {counts[name]}" for name in used)
    text = f"gives {' and '.join(names)} no sample of a batch of {batch_size} ({parts})"
    enough = next(
        (size for size in range(multiple, MAX_BATCH, multiple) if size > batch_size and not lost(size)), None
    )
    return f"{text}; take a batch_size of {enough}" if enough else f"{text}; raise the share, or set it to 0"


def _counts(batch_size: int, mixture: Mapping[str, float], buffered: bool) -> dict[str, int]:
    used = [name for name in SOURCES if mixture.get(name, 0.0) > 0]
    counts = {name: int(mixture.get(name, 0.0) * batch_size + 1e-9) for name in SOURCES}
    _deal(counts, used, batch_size - sum(counts.values()))
    if counts["buffer"] and not buffered:
        freed, counts["buffer"] = counts["buffer"], 0
        others = [name for name in used if name != "buffer"]
        if not others:
            raise UserError("the mixture takes the whole batch from the buffer, which holds no samples")
        _deal(counts, others, freed)
    return counts


def batch_indices(
    step: int, seed: int, batch_size: int, mixture: Mapping[str, float], sizes: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """int64 sample indices per source for the global batch of `step` (0-based). Raises UserError as `batch_counts` does."""
    counts = batch_counts(batch_size, mixture, sizes)
    return {
        name: _walk(step * count, count, seed, number, sizes.get(name, 0))
        for number, (name, count) in enumerate(counts.items())
    }


def generator(seed: int, *place: int) -> np.random.Generator:
    """A random generator (Philox) that depends on `seed` and the numbers of `place` only."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *place])))


def _deal(counts: dict[str, int], names: list[str], amount: int) -> None:
    for number in range(len(names)):
        counts[names[number]] += amount // len(names) + (number < amount % len(names))


def _walk(start: int, count: int, seed: int, source: int, size: int) -> np.ndarray:
    """Positions start .. start + count of an endless sequence of permutations of `size` samples."""
    taken: list[np.ndarray] = []
    while count > 0:
        epoch, offset = divmod(start, size)
        part = _permutation(seed, source, epoch, size)[offset : offset + count]
        taken.append(part)
        start, count = start + len(part), count - len(part)
    return np.concatenate(taken) if taken else np.empty(0, np.int64)


@lru_cache(maxsize=8)
def _permutation(seed: int, source: int, epoch: int, size: int) -> np.ndarray:
    order = generator(seed, 0, source, epoch).permutation(size)
    order.flags.writeable = False
    return order
