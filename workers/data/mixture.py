"""Which samples make up a training batch: pure index arithmetic, with no memory of earlier steps.

The shares follow FoMo-in-Flux v1.0, which TIME uses: of a batch of 512 at .33/.34/.33, 169 samples come from the pretraining
pool, 175 from the current task and 168 from the buffer of earlier tasks; while there is no buffer its share is split equally,
which gives 253 + 259. Each source is walked in seeded permutations, so every sample is seen once before any is seen twice.
Invariant: the indices of a step depend on (seed, step, batch size, mixture, sizes) only; a run resumed at step k continues exactly.
"""

from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from merge_service.errors import UserError

SOURCES = ("pretraining", "update", "buffer")
MAX_BATCH = 100_000
"""Up to which a batch size that would do is looked for."""


def batch_counts(batch_size: int, mixture: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, int]:
    """How many samples of a batch each source gives; they sum to `batch_size`.

    `mixture` holds shares that sum to 1, `sizes` the number of samples there are. Shares are rounded down and what is left goes
    to the sources in order, pretraining first. An empty buffer's share is split equally among the other sources in use.
    Raises UserError if another source has a share but no samples, or a share that comes to no sample of a batch.
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
    """What is wrong with a batch size that gives a source with a share no sample of any batch, and which size would do.

    `buffered`: whether there are earlier tasks to replay. The size named is a multiple of `multiple`.
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
    """A random generator that depends on `seed` and the numbers of `place` only (Philox, so no state is carried along)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *place])))


def _deal(counts: dict[str, int], names: list[str], amount: int) -> None:
    for number in range(len(names)):
        counts[names[number]] += amount // len(names) + (number < amount % len(names))


def _walk(start: int, count: int, seed: int, source: int, size: int) -> np.ndarray:
    """Positions start .. start + count of an endless row of permutations of `size` samples."""
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
