"""Pictures of a split that are decoded when they are asked for, and what goes with them without being held in memory.

A plain JPEG that training cuts a piece out of is decoded by libjpeg-turbo through simplejpeg, every other picture by Pillow; both let
other threads run. What simplejpeg does not take without a warning, Pillow judges, as for the decoded cache.
Invariant: `pictures[row]` is, bit for bit, what the decoded cache holds; a piece depends on the picture and its box alone.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from typing import Any, Self

import numpy as np
import simplejpeg
import torch
from PIL import Image

from workers.data.contents import captions_of, open_image
from workers.data.encoded.shards import Shards
from workers.data.pictures import as_seen
from workers.data.tarscan import ShardError

Geometry = Callable[[Image.Image], Image.Image]
_BROKEN = (OSError, ValueError, SyntaxError)


class _Some:
    """All samples of a split, or those of some rows."""

    def __init__(self, shards: Shards) -> None:
        self._shards, self._rows = shards, None

    _rows: np.ndarray | None

    def only(self, rows: np.ndarray) -> Self:
        """The same of some rows."""
        found = copy(self)
        found._rows = rows if self._rows is None else self._rows[rows]
        return found

    def __len__(self) -> int:
        return len(self._shards.index.labels) if self._rows is None else len(self._rows)

    def _places(self, key: Any) -> np.ndarray:
        """Fields of the index for rows of ours."""
        places: np.ndarray = self._shards.index.places[key if self._rows is None else self._rows[key]]
        return places

    def _row(self, row: int) -> int:
        return row if self._rows is None else int(self._rows[row])


class Pictures(_Some):
    """uint8 [N, H, W, 3]: one picture for a number, several for a slice or an array, as the decoded cache holds them."""

    dtype = np.dtype(np.uint8)

    def __init__(self, shards: Shards, geometry: Geometry, size: Sequence[int]) -> None:
        super().__init__(shards)
        self._geometry, self._size = geometry, tuple(size)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, H, W, 3)."""
        return (len(self), *self._size, 3)

    def __getitem__(self, key: Any) -> np.ndarray:
        if isinstance(key, int | np.integer):
            return self._whole(self._row(int(key)))
        rows = np.arange(len(self))[key]
        found = np.empty((len(rows), *self.shape[1:]), np.uint8)
        for out, row in zip(found, rows.tolist(), strict=True):
            out[...] = self._whole(self._row(row))
        return found

    def sizes(self, rows: np.ndarray) -> np.ndarray:
        """Heights and widths of the originals as a person sees them, int64 [n, 2]."""
        places = self._places(rows)
        return np.stack([places["height"], places["width"]], axis=1).astype(np.int64)

    def cut(self, row: int, box: Sequence[int], out: np.ndarray) -> None:
        """Fill `out` uint8 [H, W, 3] with a piece (top, left, height, width) of the original, resized bicubically with antialiasing.

        Raises ShardError for a picture that cannot be decoded.
        """
        top, left, height, width = box
        whole = self._original(self._row(row))
        piece = torch.from_numpy(whole[top : top + height, left : left + width]).permute(2, 0, 1)[None]
        piece = piece.contiguous(memory_format=torch.channels_last)  # other layouts take twice as long
        target = torch.from_numpy(out).permute(2, 0, 1)[None]
        # what functional.interpolate calls, without memory of its own for every picture
        torch.ops.aten._upsample_bicubic2d_aa.out(piece, out.shape[:2], False, None, None, out=target)

    def _original(self, row: int) -> np.ndarray:
        """The whole picture as a person sees it, uint8 [h, w, 3]."""
        data, place = self._shards.picture(row), self._shards.index.places[row]
        found = _by_turbo(data) if place["plain"] else None
        if found is None:
            found = np.array(self._by_pillow(data, row, lambda image: image.convert("RGB")))
        if found.shape[:2] != (place["height"], place["width"]):
            raise self._broken(row, f"it is {found.shape[1]}x{found.shape[0]}, not what was indexed")
        return found

    def _whole(self, row: int) -> np.ndarray:
        return np.asarray(self._by_pillow(self._shards.picture(row), row, self._geometry))

    def _by_pillow(self, data: bytes, row: int, then: Geometry) -> Image.Image:
        path = self._shards.path(row)
        try:
            return then(as_seen(open_image(data, path, "")))
        except ShardError:  # once more, to name it: finding the name takes longer than reading the picture
            open_image(data, path, self._shards.name(row))
            raise
        except _BROKEN as error:
            raise self._broken(row, str(error)) from None

    def _broken(self, row: int, why: str) -> ShardError:
        name = self._shards.name(row)
        return ShardError(self._shards.path(row), "unreadable", f"image {name!r} cannot be decoded ({why})")


class Captions(_Some, Sequence[tuple[str, ...]]):
    """The captions of every sample, read from its shard."""

    def __getitem__(self, key: Any) -> Any:
        row = self._row(int(key))
        text = self._shards.text(row)
        return tuple(captions_of(text, self._shards.path(row), "")) if text else ()

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        return (self[row] for row in range(len(self)))


class Same(_Some):
    """int64 [N], worked out when it is asked for: the first row of a retrieval split that shows the same picture file."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        named = np.ascontiguousarray(self._shards.index.places["picture"]).view("<u8,<u8")
        _, first, which = np.unique(named, return_index=True, return_inverse=True)
        firsts: np.ndarray = first[which]
        return firsts if self._rows is None else firsts[self._rows]


def _by_turbo(data: bytes) -> np.ndarray | None:
    """uint8 [h, w, 3], None for data that libjpeg-turbo has a word to say about."""
    try:
        found: np.ndarray = simplejpeg.decode_jpeg(data, colorspace="RGB")
        return found
    except ValueError:
        return None
