"""Tensors that a library computes when it builds a model, and saves or not by its version: they say nothing of training.

Positions 0, 1, 2, ..., causal masks, rotary frequencies and the like stand in the files of one version of transformers or timm and not
in those of the next. A model fine-tuned from such a file lacks them, and is of the same architecture all the same.

Invariant: a tensor is one of them by name and by content, so that nothing trained is ever taken for one.
"""

from collections.abc import Iterable

import numpy as np

from merge_service.checkpoints.checkpoint import Checkpoint

LARGEST = 1 << 20
"""Elements of a buffer other than a mask."""
_ROWS = 256


def buffers(checkpoint: Checkpoint, names: Iterable[str] | None = None) -> frozenset[str]:
    """The names of such tensors in a checkpoint, of these or of all."""
    asked = checkpoint.tensors if names is None else names
    return frozenset(name for name in asked if _is_buffer(checkpoint, name))


def _is_buffer(checkpoint: Checkpoint, name: str) -> bool:
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


def _is_causal(checkpoint: Checkpoint, name: str, side: int) -> bool:
    """Whether these are ones in the lower triangle (or a band of it) and zeros above."""
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
    """Whether numbers are 0 or one that lets nothing through (-inf of CLIP, -100 of Swin)."""
    least = values.min()
    return bool(least <= -100 and np.all((values == 0) | (values == least)))


_COMPUTED = {
    "position_ids": (False, lambda x: np.array_equal(x, np.arange(x.size))),
    "token_type_ids": (False, lambda x: not x.any()),
    "relative_position_index": (False, lambda x: bool(np.all(x >= 0))),
    "inv_freq": (True, _are_frequencies),
    "attn_mask": (True, _is_mask),
}
"""By the last word of a name whether its numbers are floats, and what holds of them."""
