"""Reading samples of a split by their number, in any order and from several threads, without reading what lies between.

Shards are local files, or objects at an address of which ranges are read. Files are opened when a sample of theirs is first needed, and
only so many stay open.
Invariant: what is returned is as many bytes as the index states, from an address those that were indexed; else a ShardError names the
shard.
"""

import contextlib
import os
from functools import lru_cache
from pathlib import Path

import numpy as np

from workers.data.encoded.index import PARTS, Index, Split, content, rows_of
from workers.data.encoded.remote import read_range
from workers.data.tarscan import ShardError, members

OPEN_FILES = 256
"""Shards of all splits that a process holds open."""


class Shards:
    """The shards of one split and its index."""

    def __init__(self, split: Split, index: Index) -> None:
        self.split, self.index = split, index
        where = split.address or f"{split.home}/"
        self._paths = [f"{where}{shard.file}" for shard in split.shards]
        self._first = rows_of(split)

    def picture(self, row: int) -> bytes:
        """The file of a picture. Raises ShardError."""
        return self._read(row, *PARTS[0])

    def text(self, row: int) -> bytes:
        """The captions of a sample, b"" where it has none. Raises ShardError."""
        return self._read(row, *PARTS[1])

    def path(self, row: int) -> Path | str:
        """The shard of a sample: its path, or its address."""
        found = self._paths[self._number(row)]
        return found if self.split.address else Path(found)

    def name(self, row: int) -> str:
        """The name of a picture's file in its shard; "sample N" where the shard can no longer be read, or is at an address."""
        offset, shard = int(self.index.places[row]["offset"]), self.path(row)
        member = None
        if isinstance(shard, Path):
            with contextlib.suppress(ShardError, OSError):
                member = next((one for one in members(shard) if one.offset == offset), None)
        first = self._first[self._number(row)]
        return member.name if member else f"sample {row - int(first) + 1}"

    def _number(self, row: int) -> int:
        return int(np.searchsorted(self._first, row, side="right")) - 1

    def _read(self, row: int, start: str, size: str, digest: str) -> bytes:
        place, path = self.index.places[row], self._paths[self._number(row)]
        offset, length = int(place[start]), int(place[size])
        if not length:
            return b""
        if self.split.address:
            data = read_range(path, offset, length)
            if content(data) != place[digest].tobytes():
                raise ShardError(
                    path, "flipped", f"the bytes from {offset} on are no longer those that were indexed"
                )
            return data
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
