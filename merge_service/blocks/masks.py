"""Random masks without a generator: a hash of expert, tensor and position decides whether an element is kept.

A stream of random numbers depends on the order of drawing; a hash does not. The mask is the same for any block size, thread
count, device, order of tensors or order of arrival.

Hash: SplitMix64 (Steele, Lea, Flood 2014) at counter = element index // 2, keyed by (seed, expert id, tensor name). Its lower 32
bits decide for the even element, the upper ones for the odd.
"""

import hashlib
import json
from fractions import Fraction
from typing import Any

Array = Any

_GAMMA = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_HALF = 2**32


def tensor_key(seed: int, expert_id: str, tensor: str) -> int:
    """The 64-bit key of one expert's tensor."""
    text = json.dumps([seed, expert_id, tensor]).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def ceiling(density: float) -> int:
    """The number of 32-bit hashes that keep an element: density * 2^32, computed from the decimal as written."""
    return int(Fraction(repr(density)) * _HALF)


def kept(xp: Any, key: int, start: int, like: Array, density: float) -> Array:
    """Booleans for elements start..start + like.size, each true with probability `density`; an array like `like`."""
    return hashes(xp, key, start, like) < ceiling(density)


def hashes(xp: Any, key: int, start: int, like: Array) -> Array:
    """The 32-bit hashes of elements start..start + like.size, as int64 on the device of `like`."""
    size = like.shape[0]
    first, last = start // 2, (start + size + 1) // 2
    where = {"device": like.device} if hasattr(like, "is_cuda") else {}
    counter = xp.arange(first + 1, last + 1, dtype=xp.int64, **where)
    z = counter * _signed(_GAMMA) + _signed(key)
    for shift, factor in _MIX:
        z = (z ^ _shifted(z, shift)) * _signed(factor)
    z = z ^ _shifted(z, 31)
    halves = xp.stack((z & (_HALF - 1), _shifted(z, 32))).T.reshape(-1)
    return halves[start % 2 : start % 2 + size]


def _signed(word: int) -> int:
    """The 64 bits of `word` as the int64 that has them: its products wrap around alike."""
    word %= 2**64
    return word - 2**64 if word >= 2**63 else word


def _shifted(words: Array, by: int) -> Array:
    """Shifted right with zeros coming in, which int64 alone does not do."""
    return (words >> by) & ((1 << (64 - by)) - 1)
