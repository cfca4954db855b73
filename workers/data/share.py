"""The content of a batch as numbers: rows of splits, crop boxes, tokens. No picture is decoded here.

The module needs numpy alone, so that code that feeds a device can use it without the rest of this project.
Invariant: a box depends on its draws, the size of its picture and the crop settings only.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Union

import numpy as np

if TYPE_CHECKING:
    from workers.data.encoded.pictures import Pictures


@dataclass(frozen=True)
class Share:
    """One rank's part of a batch, before its pictures are read.

    Picture i is row `rows[i]` of split `parts[i]`, both int64 [b]. `boxes` float32 [b, 4] are the crops that the device makes (see
    `crop_boxes`), or [0, 4] if it makes none. `tokens` int64 [u, context] are the distinct texts in lexicographic order; `places`
    int64 [b] is the row of `tokens` of each picture. `pieces` int64 [b, 4] are the crops of originals when they are read (see
    `piece_boxes`); a row of zeros, or no row, means none.
    """

    parts: np.ndarray
    rows: np.ndarray
    boxes: np.ndarray
    tokens: np.ndarray
    places: np.ndarray
    pieces: np.ndarray = field(default_factory=lambda: np.empty((0, 4), np.int64))


WHOLE = (0.0, 0.0, 1.0, 1.0)
"""The box of a picture that is used whole, or has been cropped already."""
_TRIES = 10
CROP_DRAWS = 2 * _TRIES + 2


def crop_boxes(
    draws: np.ndarray, height: int, width: int, scale: Sequence[float], ratio: Sequence[float]
) -> np.ndarray:
    """One random crop per row of `draws` float64 [b, CROP_DRAWS] in [0, 1).

    Returns (top, left, height, width) as shares of an image of `height` x `width` pixels, float64 [b, 4]. The distribution is that of
    torchvision's RandomResizedCrop (area uniform in `scale`, aspect log-uniform in `ratio`, ten tries, then the largest centred box
    of a permitted aspect), except that edges need not be on whole pixels.
    """
    area = height * width * (scale[0] + draws[:, :_TRIES] * (scale[1] - scale[0]))
    aspect = np.exp(np.log(ratio[0]) + draws[:, _TRIES : 2 * _TRIES] * (np.log(ratio[1]) - np.log(ratio[0])))
    wide, high = np.sqrt(area * aspect), np.sqrt(area / aspect)
    fits = (wide <= width) & (high <= height)
    best = np.argmax(fits, axis=1)
    rows = np.arange(len(draws))
    wide, high = wide[rows, best], high[rows, best]
    centred = np.clip(width / height, ratio[0], ratio[1])
    none = ~fits.any(axis=1)
    wide = np.where(none, min(width, height * centred), wide) / width
    high = np.where(none, min(height, width / centred), high) / height
    top = np.where(none, 0.5, draws[:, -2]) * (1 - high)
    left = np.where(none, 0.5, draws[:, -1]) * (1 - wide)
    return np.stack([top, left, high, wide], axis=1)


def piece_boxes(
    draws: np.ndarray, sizes: np.ndarray, scale: Sequence[float], ratio: Sequence[float]
) -> np.ndarray:
    """One random crop per row of `draws`, as `crop_boxes`, of pictures of `sizes` int64 [b, 2] (height, width).

    Returns (top, left, height, width) in whole pixels, int64 [b, 4]. It is torchvision's RandomResizedCrop on these draws,
    rounding included.
    """
    height, width = sizes[:, 0], sizes[:, 1]
    area = (height * width)[:, None] * (scale[0] + draws[:, :_TRIES] * (scale[1] - scale[0]))
    aspect = np.exp(np.log(ratio[0]) + draws[:, _TRIES : 2 * _TRIES] * (np.log(ratio[1]) - np.log(ratio[0])))
    wide, high = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (wide > 0) & (wide <= width[:, None]) & (high > 0) & (high <= height[:, None])
    best, rows = np.argmax(fits, axis=1), np.arange(len(draws))
    none = ~fits.any(axis=1)
    centred = np.clip(width / height, ratio[0], ratio[1])
    wide = np.where(none, np.minimum(width, np.rint(height * centred)), wide[rows, best])
    high = np.where(none, np.minimum(height, np.rint(width / centred)), high[rows, best])
    top = np.where(none, (height - high) // 2, np.floor(draws[:, -2] * (height - high + 1)))
    left = np.where(none, (width - wide) // 2, np.floor(draws[:, -1] * (width - wide + 1)))
    return np.maximum(np.stack([top, left, high, wide], axis=1), [0, 0, 1, 1]).astype(np.int64)


class Rows:
    """Selected rows of an array, copied on access, so that a class-filtered split shares the memory map."""

    def __init__(self, array: np.ndarray, index: np.ndarray):
        self.array, self.index = array, index
        self.shape, self.dtype = (len(index), *array.shape[1:]), array.dtype

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: Any) -> np.ndarray:
        return self.array[self.index[key]]


def copy_rows(images: Union[np.ndarray, Rows, "Pictures"], rows: np.ndarray, out: np.ndarray) -> None:
    """Copy pictures `rows` (valid indices) into `out`, uint8 [len(rows), H, W, 3] and contiguous.

    Of an array it is one call that lets other threads run; a call per picture makes them wait for each other.
    """
    if isinstance(images, Rows):
        rows, images = images.index[rows], images.array
    if isinstance(images, np.ndarray):
        images.take(rows, axis=0, out=out, mode="clip")  # other modes copy twice
        return
    for row, at in zip(out, rows.tolist(), strict=True):
        row[...] = images[at]
