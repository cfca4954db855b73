"""Files of which only the size and a beginning are here; the rest is fetched by range while it is read.

A remote model is a folder on this machine in which every file of weights is a sparse one of full size, with the header alone. Whoever
opens it sees an ordinary folder; bytes beyond the header come from `fetch`. Pieces that were read last stay in memory, because a tensor
is read block by block.

Invariant: a byte that is returned is that of the remote file; the sparse file's own zeros are never returned.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from merge_service.files.mapping import mapped

PIECE = 4 << 20
"""Bytes that are fetched at a time at least; reading goes on where it stopped."""
LITTLE = 1 << 16
"""A read of fewer bytes, such as a sample, is fetched alone unless its piece is here."""
HELD = 64
"""Pieces that stay in memory, of all files together: 256 MiB."""

Fetch = Callable[[int, int], bytes]
"""`fetch(start, stop)` gives these bytes of a file."""
_files: dict[Path, Fetch] = {}
_folders: dict[Path, str] = {}
_pieces: OrderedDict[tuple[Path, int], np.ndarray] = OrderedDict()
_lock = threading.Lock()


@contextmanager
def far(folder: Path, url: str, files: Mapping[Path, Fetch]) -> Iterator[None]:
    """For the length of a `with` block, `folder` stands for `url` and the bytes of `files` in it are fetched."""
    there = {file.resolve(): fetch for file, fetch in files.items()}
    _folders[folder.resolve()] = url
    _files.update(there)
    try:
        yield
    finally:
        _folders.pop(folder.resolve(), None)
        with _lock:
            for file in there:
                _files.pop(file, None)
            for key in [key for key in _pieces if key[0] in there]:
                del _pieces[key]


def is_far(file: Path) -> bool:
    """Whether the bytes of a file are fetched."""
    return bool(_files) and file.resolve() in _files


def origin(path: Path) -> str | None:
    """The URL that a folder, or a file in one, stands for; None for a path of this machine."""
    if not _folders:
        return None
    whole = path.resolve()
    if whole in _folders:
        return _folders[whole]
    return f"{_folders[whole.parent]}/{whole.name}" if whole.parent in _folders else None


class Ranged:
    """The bytes of a far file, as an array of uint8 that is sliced and nothing else."""

    def __init__(self, file: Path) -> None:
        self.file, self.size = file.resolve(), file.stat().st_size
        self._fetch = _files[self.file]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, where: slice) -> np.ndarray:
        start, stop, _ = where.indices(self.size)
        if stop <= start:
            return np.empty(0, np.uint8)
        if stop - start < LITTLE and not self._is_held(start, stop):
            return np.frombuffer(self._fetch(start, stop), np.uint8)
        parts = [self._piece(at) for at in range(start // PIECE, -(-stop // PIECE))]
        first = start // PIECE * PIECE
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        found = whole[start - first : stop - first]
        found.setflags(write=False)
        return found

    def _is_held(self, start: int, stop: int) -> bool:
        with _lock:
            return all((self.file, at) in _pieces for at in range(start // PIECE, -(-stop // PIECE)))

    def _piece(self, at: int) -> np.ndarray:
        key = (self.file, at)
        with _lock:
            if key in _pieces:
                _pieces.move_to_end(key)
                return _pieces[key]
        start, stop = at * PIECE, min((at + 1) * PIECE, self.size)
        piece = np.frombuffer(self._fetch(start, stop), np.uint8)
        with _lock:
            _pieces[key] = piece
            while len(_pieces) > HELD:
                _pieces.popitem(last=False)
        return piece


def data_of(file: Path) -> "np.ndarray | Ranged":
    """The bytes of a file, uint8, read-only: mapped, or fetched as they are sliced. Raises OSError naming the file."""
    return Ranged(file) if is_far(file) else mapped(file)
