"""Choosing between numbers by their bits.

numpy's masked copies and `where` take a branch per element, and masks of task vectors are as good as random: ten times
the cost of arithmetic. A mask of whole words (all ones where chosen) does the same with and, xor and no branch, and
copies values bit for bit.
"""

import numpy as np

from merge_service.engine import Scratch

_WORDS: dict[int, np.dtype] = {4: np.dtype(np.int32), 8: np.dtype(np.int64)}


def word_mask(chosen: np.ndarray, dtype: np.dtype, scratch: Scratch, role: str = "mask") -> np.ndarray:
    """Words as wide as `dtype`, all ones where `chosen` (booleans), else zero."""
    mask = scratch.take(role, chosen.size, _WORDS[dtype.itemsize])
    np.copyto(mask, chosen)
    return np.negative(mask, out=mask)


def zero_unless(mask: np.ndarray, values: np.ndarray) -> None:
    """Set values to +0.0 in place where the mask is not set."""
    words = values.view(mask.dtype)
    np.bitwise_and(words, mask, out=words)


def overwrite(mask: np.ndarray, values: np.ndarray, by: np.ndarray, scratch: Scratch) -> None:
    """Take `by` into `values`, in place, where the mask is set."""
    words = values.view(mask.dtype)
    change = scratch.take("change", mask.size, mask.dtype)
    np.bitwise_xor(words, by.view(mask.dtype), out=change)
    np.bitwise_and(change, mask, out=change)
    np.bitwise_xor(words, change, out=words)


def split_signs(values: np.ndarray, scratch: Scratch) -> tuple[np.ndarray, np.ndarray]:
    """max(x, 0) and min(x, 0) of numbers without NaN, each with a zero (of either sign) in the other's places."""
    words = values.view(_WORDS[values.itemsize])
    plus = scratch.take("plus part", words.size, words.dtype)
    minus = scratch.take("minus part", words.size, words.dtype)
    np.right_shift(words, 8 * values.itemsize - 1, out=minus)  # the sign, spread over the word
    np.bitwise_and(words, minus, out=minus)
    np.bitwise_xor(words, minus, out=plus)
    return plus.view(values.dtype), minus.view(values.dtype)
