"""Writing a checkpoint block by block, so that a file with the final name is always whole.

Blocks go to a preallocated temporary beside the target (a full disk shows at once), in any order and from any thread;
`close` checks that every byte was written, syncs, and renames.

Invariant: the target path either does not change, or holds the complete new file.
"""

import errno
import os
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np

from merge_service.checkpoints.dtypes import encode
from merge_service.checkpoints.header import TensorInfo, build_header
from merge_service.errors import CheckpointError
from merge_service.files.leftovers import sweep, temporary
from merge_service.files.sync import sync_directory

Layout = Mapping[str, tuple[str, Sequence[int]]]
Written = Mapping[tuple[str, int], int]
"""How many elements were written from which element of which tensor on."""


class Writer(Protocol):
    """What takes the blocks of a model, in one file or several."""

    def write_stored(self, name: str, start: int, stored: np.ndarray) -> None:
        """Store values that are already in the tensor's storage type, bit for bit."""


class CheckpointWriter:
    """Writes one safetensors file at `path`; `layout` maps names to (dtype, shape) in header order.

    As a context manager it closes on success and leaves nothing behind on an exception. Raises `CheckpointError` when
    the place cannot be written; a full disk stays an OSError (ENOSPC) for the caller to explain.
    """

    def __init__(self, path: Path | str, layout: Layout, metadata: Mapping[str, str] | None = None) -> None:
        self.path = Path(path)
        head, self.tensors = build_header(
            {n: (d, tuple(s)) for n, (d, s) in layout.items()}, dict(metadata or {})
        )
        self._size = len(head) + sum(info.nbytes for info in self.tensors.values())
        self._done: dict[tuple[str, int], int] = {}
        self._lock = threading.Lock()
        self._temporary = temporary(self.path)
        self._file = self._create()
        try:
            _preallocate(self._file, self._size)
            _write_all(self._file, memoryview(head), 0)
        except BaseException:
            self.abort()
            raise

    def write(self, name: str, start: int, array: np.ndarray) -> None:
        """Store `array` as elements start.. of the flattened tensor, rounded once to its dtype."""
        self.write_stored(name, start, encode(array, self.tensors[name].kind))

    def storage(self, name: str) -> np.dtype:
        """The type in which the tensor's elements lie in the file."""
        return self.tensors[name].kind.storage

    def write_stored(self, name: str, start: int, stored: np.ndarray) -> None:
        """Store values that are already in the tensor's storage type, bit for bit."""
        info = self.tensors[name]
        assert stored.dtype == info.kind.storage and 0 <= start <= start + stored.size <= info.numel, (
            name,
            start,
        )
        if stored.size:
            view = memoryview(np.ascontiguousarray(stored).reshape(-1).view(np.uint8))  # type: ignore[arg-type]
            _write_all(self._file, view, info.offset + start * info.kind.itemsize)
        with self._lock:
            self._done[name, start] = stored.size

    def read_back(self, name: str) -> np.ndarray:
        """A whole tensor as it was written, before the file is closed."""
        info = self.tensors[name]
        out = np.empty(info.numel, info.kind.storage)
        view, done = memoryview(out.view(np.uint8)), 0  # type: ignore[arg-type]
        while done < len(view):
            done += os.preadv(self._file, [view[done:]], info.offset + done)
        return out

    @property
    def awake(self) -> bool:
        """Whether the file is open: a resting or settled one is not."""
        return self._file >= 0

    def rest(self) -> None:
        """Close the file for now, so that few are open at a time; `wake` goes on with it."""
        os.close(self._file)
        self._file = -1

    def wake(self) -> None:
        """Open a resting file again."""
        if not self.awake:
            self._file = os.open(self._temporary, os.O_RDWR | os.O_CLOEXEC)

    def slot(self) -> "Slot":
        """For others to write into the same temporary, through `SlotWriter`; from here on this writer must not write.

        A page that is half this process's and half another's could otherwise reach a network file system as one.
        """
        os.fsync(self._file)
        return Slot(self.path, self._temporary.absolute(), self.tensors)

    def account(self, written: Written) -> None:
        """Take note of what a `SlotWriter` wrote."""
        self._done |= written

    def close(self) -> None:
        """Make the file appear under its name, durably. Asserts that every element was written."""
        self.settle()
        self.publish()

    def settle(self) -> None:
        """Make what was written durable; asserts that it is everything."""
        written: Counter[str] = Counter()
        for (name, _), size in self._done.items():
            written[name] += size
        missing = [name for name, info in self.tensors.items() if written[name] != info.numel]
        if missing:
            self.abort()
            raise AssertionError(f"{self.path}: not every block of {missing[:3]} was written")
        self.wake()
        os.fsync(self._file)
        os.close(self._file)
        self._file = -1

    def publish(self) -> None:
        """Give the settled file its name, durably."""
        self._temporary.replace(self.path)
        sync_directory(self.path.parent)

    def abort(self) -> None:
        """Drop what was written; the target is untouched."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self._temporary.unlink(missing_ok=True)

    def _create(self) -> int:
        if self.path.is_dir():
            raise CheckpointError(f"cannot write {self.path}: it is a directory; name a file")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            sweep(self.path)
            return os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise CheckpointError(
                f"cannot write {self.path}: {error.strerror}; choose a writable place"
            ) from error

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


@dataclass(frozen=True)
class Slot:
    """The temporary behind an open writer, as a plain value: the path it will have, where it is, where tensors go in it."""

    path: Path
    temporary: Path
    tensors: Mapping[str, TensorInfo]


class SlotWriter(CheckpointWriter):
    """Writes blocks into the temporary of a `CheckpointWriter` in another process, which alone makes the file appear.

    Raises `CheckpointError` when the temporary cannot be opened here.
    """

    def __init__(self, slot: Slot) -> None:
        self.path, self._temporary, self.tensors = slot.path, slot.temporary, dict(slot.tensors)
        self._done = {}
        self._lock = threading.Lock()
        try:  # for writing only: an NFS client then sends the bytes it was given, not the page around them
            self._file = os.open(slot.temporary, os.O_WRONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"cannot write {slot.temporary}: {error.strerror}") from error

    @property
    def written(self) -> Written:
        """What was written here."""
        return self._done

    def close(self) -> None:
        """Sync what was written."""
        os.fsync(self._file)
        self.abort()

    def abort(self) -> None:
        """Let go of the file, which is its owner's to remove."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _preallocate(file: int, size: int) -> None:
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(file, size)


def _write_all(file: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwrite(file, data, offset)
        data, offset = data[done:], offset + done
