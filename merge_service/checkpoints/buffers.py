"""Tensors that a library computes when it builds a model: positions 0, 1, 2, ..., causal masks, rotary frequencies.

One version of transformers or timm saves them and the next does not. A model fine-tuned from such a file lacks them and still has
the same architecture.

Invariant: a tensor is a buffer only by name and content together, so no trained tensor is taken for one.
"""

from collections.abc import Iterable

import numpy as np

from merge_service.checkpoints.weights import Weights

LARGEST = 1 << 20
"""Most elements of a buffer that is not a mask."""
_ROWS = 256


def buffers(checkpoint: Weights, names: Iterable[str] | None = None) -> frozenset[str]:
    """The names of a checkpoint's buffers, among `names` or all."""
    asked = checkpoint.tensors if names is None else names
    return frozenset(name for name in asked if _is_buffer(checkpoint, name))


def _is_buffer(checkpoint: Weights, name: str) -> bool:
    info, word = checkpoint.tensors[name], name.rpartition(".")[2]
    if word in ("bias", "causal_mask"):
        square = len(info.shape) == 4 and info.shape[:2] == (1, 1) and info.shape[2] == info.shape[3]
        return square and _is_causal(checkpoint, name, info.shape[3])
    if word == "masked_bias":
        return info.numel == 1 and info.kind.is_float and float(checkpoint.read(name)[0]) <= -1e4
    if not 0 < info.numel <= LARGEST or word not in _COMPUTED:
        return False
    is_float, holds = _COMPUTED[word]
    return info.kind.is_float == is_float and holds(checkpoint.read(name))


def _is_causal(checkpoint: Weights, name: str, side: int) -> bool:
    """Whether the values are ones in the lower triangle (or a band of it) and zeros above."""
    for start in range(0, side, _ROWS):
        stop = min(start + _ROWS, side)
        rows = checkpoint.read(name, start * side, stop * side).reshape(stop - start, side)
        if np.triu(rows, start + 1).any() or not (np.diagonal(rows, start) == 1).all():
            return False
        if not ((rows == 0) | (rows == 1)).all():
            return False
    return side > 1


def _are_frequencies(values: np.ndarray) -> bool:
    return bool(np.all(values > 0) and np.all(np.diff(values) <= 0) and values[0] <= 1)


def _is_mask(values: np.ndarray) -> bool:
    """Whether all numbers are 0 or one large negative number (-inf in CLIP, -100 in Swin)."""
    least = values.min()
    return bool(least <= -100 and np.all((values == 0) | (values == least)))


_COMPUTED = {
    "position_ids": (False, lambda x: np.array_equal(x, np.arange(x.size))),
    "token_type_ids": (False, lambda x: not x.any()),
    "relative_position_index": (False, lambda x: bool(np.all(x >= 0))),
    "inv_freq": (True, _are_frequencies),
    "attn_mask": (True, _is_mask),
}
"""By the last component of a name: whether its numbers are floats, and the condition on them."""
