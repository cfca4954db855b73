"""Reading samples of a split by their number, in any order and from several threads, without reading what lies between.

Shards are plain local files. They are opened when a sample of theirs is first asked for, and only so many stay open.
Invariant: what is returned is as many bytes as the index states; fewer are a ShardError that names the shard.
"""

import os
from functools import lru_cache
from pathlib import Path

import numpy as np

from workers.data.encoded.index import Index, Split, rows_of
from workers.data.tarscan import ShardError, members

OPEN_FILES = 256
"""Shards of all splits that a process holds open."""


class Shards:
    """The shards of one split and its index."""

    def __init__(self, split: Split, index: Index) -> None:
        self.split, self.index = split, index
        self._paths = [str(split.home / shard.file) for shard in split.shards]
        self._first = rows_of(split)

    def picture(self, row: int) -> bytes:
        """The file of a picture. Raises ShardError."""
        place = self.index.places[row]
        return self._read(row, int(place["offset"]), int(place["length"]))

    def text(self, row: int) -> bytes:
        """The captions of a sample, b"" where it has none. Raises ShardError."""
        place = self.index.places[row]
        length = int(place["text_length"])
        return self._read(row, int(place["text_offset"]), length) if length else b""

    def path(self, row: int) -> Path:
        """The shard of a sample."""
        return Path(self._paths[self._number(row)])

    def name(self, row: int) -> str:
        """The name of a picture's file in its shard; "sample N" where the shard can no longer be read."""
        offset = int(self.index.places[row]["offset"])
        try:
            found = (member for member in members(self.path(row)) if member.offset == offset)
            member = next(found, None)
        except (ShardError, OSError):
            member = None
        first = self._first[self._number(row)]
        return member.name if member else f"sample {row - int(first) + 1}"

    def _number(self, row: int) -> int:
        return int(np.searchsorted(self._first, row, side="right")) - 1

    def _read(self, row: int, offset: int, length: int) -> bytes:
        path = self._paths[self._number(row)]
        try:
            data = _opened(path).read(offset, length)
        except OSError as error:
            raise ShardError(Path(path), "missing", f"it cannot be read any more ({error})") from None
        if len(data) < length:
            raise ShardError(Path(path), "cut", f"the file ends inside the sample at byte {offset}")
        return data


class _Open:
    """An open file. It is closed when its last user is done with it, also one that reads while it leaves the cache."""

    def __init__(self, path: str) -> None:
        self._number = -1
        self._number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self._number >= 0:
            os.close(self._number)

    def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes from `offset` on; fewer only at the end of the file."""
        data = os.pread(self._number, length, offset)
        while 0 < len(data) < length and (
            more := os.pread(self._number, length - len(data), offset + len(data))
        ):
            data += more
        return data


@lru_cache(maxsize=OPEN_FILES)
def _opened(path: str) -> _Open:
    return _Open(path)
