"""Writes a checkpoint block by block; a file with the final name is always complete.

Blocks go to a preallocated temporary file beside the target (a full disk fails at once), in any order and from any thread.
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
from merge_service.files.digest import Digest
from merge_service.files.leftovers import sweep, temporary
from merge_service.files.sync import sync_directory

Layout = Mapping[str, tuple[str, Sequence[int]]]
Written = Mapping[tuple[str, int], int]
"""The number of elements written, by tensor and first element."""


class Writer(Protocol):
    """Takes the blocks of a model, into one file or several (`files`)."""

    @property
    def files(self) -> "Sequence[CheckpointWriter]": ...

    def write_stored(self, name: str, start: int, stored: np.ndarray) -> None:
        """Store values that are already in the tensor's storage type, bit for bit."""


class CheckpointWriter:
    """Writes one safetensors file at `path`; `layout` maps names to (dtype, shape) in header order.

    As a context manager it closes on success and removes its temporary file on an exception. With a `digest`, `digest_found` is the
    file's once it is settled. A writer that is not `durable` syncs nothing: its file is a cache, or its caller syncs it. Raises
    `CheckpointError` if the path cannot be written; a full disk stays an OSError (ENOSPC) for the caller to explain.
    """

    digest_found: str | None = None
    _digest: Digest | None = None
    _durable = True

    def __init__(
        self,
        path: Path | str,
        layout: Layout,
        metadata: Mapping[str, str] | None = None,
        digest: Digest | None = None,
        durable: bool = True,
    ) -> None:
        self.path = Path(path)
        self._digest, self._durable = digest, durable
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
            self._put(memoryview(head), 0)
        except BaseException:
            self.abort()
            raise

    def write(self, name: str, start: int, array: np.ndarray) -> None:
        """Store `array` as elements start.. of the flattened tensor, rounded once to its dtype."""
        self.write_stored(name, start, encode(array, self.tensors[name].kind))

    def storage(self, name: str) -> np.dtype:
        """The type of the tensor's elements in the file."""
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
            self._put(view, info.offset + start * info.kind.itemsize)
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
    def files(self) -> "list[CheckpointWriter]":
        """The writer of the one file."""
        return [self]

    @property
    def awake(self) -> bool:
        """Whether the file is open; it is not while the writer rests or after it has settled."""
        return self._file >= 0

    def rest(self) -> None:
        """Close the file for now, to limit the number of open files; `wake` opens it again."""
        os.close(self._file)
        self._file = -1

    def wake(self) -> None:
        """Open a resting file again."""
        if not self.awake:
            self._file = os.open(self._temporary, os.O_RDWR | os.O_CLOEXEC)

    def slot(self) -> "Slot":
        """The value by which other processes write into the same temporary file, through `SlotWriter`. This writer must not write
        afterwards: a network file system could otherwise store a page of two processes with the bytes of one only.
        """
        os.fsync(self._file)
        return Slot(self.path, self._temporary.absolute(), self.tensors)

    def account(self, written: Written) -> None:
        """Record what a `SlotWriter` wrote."""
        self._done |= written

    def close(self) -> None:
        """Publish the file under its name. Asserts that every element was written."""
        self.settle()
        self.publish()

    def settle(self) -> None:
        """Close the file, synced if it is durable; asserts that every element was written."""
        if missing := unwritten(self._done, self.tensors):
            self.abort()
            raise AssertionError(f"{self.path}: not every block of {missing[:3]} was written")
        self.wake()
        if self._digest:
            self.digest_found = self._digest.finish(self._file, self._size)
        if self._durable:
            os.fsync(self._file)
        os.close(self._file)
        self._file = -1

    def publish(self) -> None:
        """Rename the settled file to its final name."""
        self._temporary.replace(self.path)
        if self._durable:
            sync_directory(self.path.parent)

    def abort(self) -> None:
        """Remove the temporary file; the target is unchanged."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self._temporary.unlink(missing_ok=True)

    def _put(self, data: memoryview, offset: int) -> None:
        _write_all(self._file, data, offset)
        if self._digest:
            self._digest.add(offset, data)

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
        try:
            if kind is None:
                self.close()
        finally:
            self.abort()


@dataclass(frozen=True)
class Slot:
    """The temporary file of an open writer, as a plain value: its final path, its present path, and the place of each tensor."""

    path: Path
    temporary: Path
    tensors: Mapping[str, TensorInfo]


class SlotWriter(CheckpointWriter):
    """Writes blocks into the temporary file of a `CheckpointWriter` in another process, which alone publishes it.

    Raises `CheckpointError` if the temporary file cannot be opened here.
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
        """Close the file; its owner removes it."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def unwritten(done: Written, tensors: Mapping[str, TensorInfo]) -> list[str]:
    """The tensors of which some elements were not written."""
    written: Counter[str] = Counter()
    for (name, _), size in done.items():
        written[name] += size
    return [name for name, info in tensors.items() if written[name] != info.numel]


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
