"""Random masks without a generator: whether an element is kept is a hash of who and where it is.

A stream of random numbers depends on the order it is drawn in; a hash does not. The mask is the same for any block size,
thread count, order of tensors or order of arrival.

Hash: SplitMix64 (Steele, Lea, Flood 2014) at counter = element index // 2, keyed by (seed, expert id, tensor name). Its
lower 32 bits speak for the even element, the upper ones for the odd.
"""

import hashlib
import json
from fractions import Fraction

import numpy as np

from merge_service.engine import Scratch

_GAMMA = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_WORD, _HALF = 2**64, 2**32


def tensor_key(seed: int, expert_id: str, tensor: str) -> int:
    """The 64-bit key of one expert's tensor."""
    text = json.dumps([seed, expert_id, tensor]).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def kept(key: int, start: int, size: int, density: float, scratch: Scratch) -> np.ndarray:
    """Booleans for elements start..start+size, each true with probability `density` (hash < density * 2^32)."""
    limit = int(Fraction(repr(density)) * _HALF)
    mask = scratch.take("kept", size, np.bool_)
    if limit >= _HALF:
        mask[:] = True
        return mask
    first, last = start // 2, (start + size + 1) // 2
    hashes = scratch.take("hashes", last - first, np.dtype("<u8"))
    shifted = scratch.take("shifted", last - first, np.uint64)
    np.add(_steps(last - first, scratch), np.uint64((key + (first + 1) * _GAMMA) % _WORD), out=hashes)
    for shift, factor in _MIX:
        np.right_shift(hashes, np.uint64(shift), out=shifted)
        np.bitwise_xor(hashes, shifted, out=hashes)
        np.multiply(hashes, np.uint64(factor), out=hashes)
    np.right_shift(hashes, np.uint64(31), out=shifted)
    np.bitwise_xor(hashes, shifted, out=hashes)
    halves = hashes.view("<u4")[start % 2 : start % 2 + size]
    return np.less(halves, np.uint32(limit), out=mask)


def _steps(size: int, scratch: Scratch) -> np.ndarray:
    """index * gamma for indices 0..size, made once per thread."""
    held: np.ndarray | None = getattr(scratch, "steps", None)
    if held is None or held.size < size:
        held = np.arange(size, dtype=np.uint64) * np.uint64(_GAMMA)
        scratch.steps = held
    return held[:size]
