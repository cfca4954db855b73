"""Digests of a file that is still being written, so that nobody has to read it again for that.

Blocks of a merge come from several threads, nearly in the order of the file. What is next is hashed at once, what comes early waits in
memory for its turn. Where too much would have to wait, or a block is written a second time, the rest is read back at the end.

Invariant: a digest is that of the bytes in the file, in whatever order they came.
"""

import hashlib
import os
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

WAITING = 64 << 20
"""Most bytes that wait in memory for those before them."""
_CHUNK = 1 << 20


class Hash(Protocol):
    """What a digest is computed by."""

    def update(self, data: bytes | memoryview, /) -> None: ...
    def hexdigest(self) -> str: ...


class Checksum:
    """CRC-32, a third of the work of sha256: it finds what was damaged or cut short, and proves nothing."""

    def __init__(self) -> None:
        self._sum = 0

    def update(self, data: bytes | memoryview, /) -> None:
        self._sum = zlib.crc32(data, self._sum)

    def hexdigest(self) -> str:
        return f"{self._sum:08x}"


class Digest:
    """The digest (sha256 unless said otherwise) of a file whose parts are handed in by any thread, each once it is written."""

    def __init__(self, made: Callable[[], Hash] = hashlib.sha256) -> None:
        self._made = made
        self._hash = made()
        self._at, self._held = 0, 0
        self._waiting: dict[int, bytes] = {}
        self._lock = threading.Lock()
        self._busy, self._open = False, True

    def add(self, start: int, data: memoryview) -> None:
        """Take note of the bytes from `start` on; the caller may use its memory again afterwards."""
        with self._lock:
            if start < self._at or (self._busy and start == self._at):
                self._at, self._open = 0, False  # written a second time: nothing that was hashed counts
            if not self._open:
                return
            if self._busy or start != self._at:
                self._wait(start, data)
                return
            self._busy = True
        self._take(data)

    def finish(self, file: int, size: int) -> str:
        """The digest of `size` bytes of an open file, of which what was not hashed yet is read."""
        if not self._at:
            self._hash = self._made()
        while self._at < size:
            part = os.pread(file, min(_CHUNK, size - self._at), self._at)
            if not part:
                raise OSError(f"the file ends after {self._at} of {size} bytes")
            self._hash.update(part)
            self._at += len(part)
        return self._hash.hexdigest()

    def _wait(self, start: int, data: memoryview) -> None:
        self._held += len(data) - len(self._waiting.get(start, b""))
        if self._held > WAITING:
            self._open = False
            self._waiting.clear()
        else:
            self._waiting[start] = bytes(data)

    def _take(self, data: memoryview | bytes | None) -> None:
        """Hash a part that is next, and all that waited for it; other threads leave theirs in the meantime."""
        while data is not None:
            self._hash.update(data)
            with self._lock:
                if not self._open and not self._at:
                    data = None
                else:
                    self._at += len(data)
                    data = self._waiting.pop(self._at, None)
                    self._held -= len(data or b"")
                self._busy = data is not None


def checksum_of(file: Path) -> str:
    """The `Checksum` of a file."""
    handle = os.open(file, os.O_RDONLY)
    try:
        return Digest(Checksum).finish(handle, os.fstat(handle).st_size)
    finally:
        os.close(handle)
