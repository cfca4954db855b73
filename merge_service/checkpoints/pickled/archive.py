"""The files in which torch keeps pickles: a zip archive with one entry for each storage (since 1.6), or one stream before that.

Invariant: numbers are mapped, never loaded as a whole, and no tensor reaches beyond its storage.
"""

import io
import math
import zipfile
import zlib
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from merge_service.checkpoints.dtypes import DTYPES
from merge_service.checkpoints.pickled.machine import Storage, Strided, read
from merge_service.errors import CheckpointError, CorruptCheckpoint
from merge_service.files.mapping import mapped

_MAGIC = 0x1950A86A20F9469CFC6C
_LIMIT = 1 << 29
"""Most bytes of the pickle itself, without numbers."""


class Archive:
    """An open pickle of torch: `value` is its tree, `stored` gives the numbers of a tensor in it. `part` is the place of the pickle
    in its file, first byte and length, if the file holds more. `records` are as of `machine.read`.
    """

    def __init__(
        self, path: Path, part: tuple[int, int] | None = None, records: Container[tuple[str, str]] = ()
    ) -> None:
        self.path, self._records = path, records
        self._starts: dict[str, tuple[int, int]] = {}
        if not path.stat().st_size:
            raise CorruptCheckpoint(f"{path} is empty")
        self._data = mapped(path)
        if part is not None:
            start, size = part
            if not 0 <= start <= start + size <= len(self._data):
                raise CorruptCheckpoint(f"{path} is cut: {size} bytes from {start} on are missing")
            self._data = self._data[start : start + size]
        try:
            is_zip = part is not None or zipfile.is_zipfile(path)
            self.value: Any = self._zipped() if is_zip else self._legacy()
        except (
            zipfile.BadZipFile,
            NotImplementedError,
            RuntimeError,
            EOFError,
            OSError,
            zlib.error,
        ) as error:
            raise CorruptCheckpoint(f"{path} is not a usable archive: {str(error)[:200]}") from None

    def stored(self, tensor: Strided) -> np.ndarray:
        """All elements of a tensor in a row, as stored. Raises `CorruptCheckpoint` if they lie outside its storage."""
        kind = DTYPES[tensor.storage.dtype]
        numel = math.prod(tensor.shape)
        last = tensor.offset + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride))
        data = self._bytes(tensor.storage)
        held = len(data) // kind.itemsize
        if numel and (last >= held or numel > held):
            raise CorruptCheckpoint(
                f"{self.path}: a tensor of shape {list(tensor.shape)} is larger than its storage of {held} elements"
            )
        if not numel:
            return np.empty(0, kind.storage)
        begin = tensor.offset * kind.itemsize
        if _is_contiguous(tensor):
            part = data[begin : begin + numel * kind.itemsize]
            return np.frombuffer(part.tobytes(), kind.storage)
        whole = np.frombuffer(data.tobytes(), kind.storage)[tensor.offset :]
        strides = [step * kind.itemsize for step in tensor.stride]
        view = np.lib.stride_tricks.as_strided(whole, tensor.shape, strides, writeable=False)
        return np.ascontiguousarray(view).reshape(-1)

    def _bytes(self, storage: Storage) -> np.ndarray:
        if storage.key not in self._starts:
            raise CorruptCheckpoint(f"{self.path} lacks the storage {storage.key[:40]!r}; it is cut")
        start, size = self._starts[storage.key]
        return self._data[start : start + size]

    def _zipped(self) -> Any:
        with zipfile.ZipFile(io.BufferedReader(_Window(self._data))) as archive:
            entries = {one.filename: one for one in archive.infolist()}
            pickles = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise CheckpointError(
                    f"{self.path} is a zip archive without one data.pkl: a TorchScript module or another archive, not a state dict"
                )
            prefix = pickles[0].removesuffix("data.pkl")
            if f"{prefix}constants.pkl" in entries:
                raise CheckpointError(
                    f"{self.path} is a TorchScript module, which holds code; save its state dict instead"
                )
            order = entries.get(f"{prefix}byteorder")
            if order is not None and archive.read(order)[:3] == b"big":
                raise CheckpointError(
                    f"{self.path} was written on a machine of the other byte order; write it again on one like this"
                )
            for name, entry in entries.items():
                if name.startswith(f"{prefix}data/"):
                    self._starts[name.removeprefix(f"{prefix}data/")] = self._start(entry), entry.file_size
            if entries[pickles[0]].file_size > _LIMIT:
                raise CorruptCheckpoint(f"{self.path}: its data.pkl is above the limit of {_LIMIT} bytes")
            with archive.open(pickles[0]) as stream:
                return read(stream, self.path, self._records)

    def _start(self, entry: zipfile.ZipInfo) -> int:
        """Where the bytes of an entry begin: behind its local header, which has lengths of its own."""
        if entry.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(
                f"{self.path}: {entry.filename} is compressed; torch stores numbers as they are"
            )
        head = bytes(self._data[entry.header_offset : entry.header_offset + 30])
        start = (
            entry.header_offset
            + 30
            + int.from_bytes(head[26:28], "little")
            + int.from_bytes(head[28:30], "little")
        )
        if head[:4] != b"PK\x03\x04" or start + entry.file_size > len(self._data):
            raise CorruptCheckpoint(f"{self.path}: the entry {entry.filename[:60]} is cut")
        return start

    def _legacy(self) -> Any:
        with self.path.open("rb") as stream:
            if read(stream, self.path) != _MAGIC:
                raise CheckpointError(f"{self.path} is a pickle, but not one that torch.save wrote")
            _, machine = read(stream, self.path), read(stream, self.path)
            if isinstance(machine, Mapping) and machine.get("little_endian") is False:
                raise CheckpointError(
                    f"{self.path} was written on a machine of the other byte order; write it again on one like this"
                )
            value, keys = read(stream, self.path), read(stream, self.path)
            if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
                raise CorruptCheckpoint(f"{self.path} does not list its storages")
            sizes = {one.key: DTYPES[one.dtype].itemsize for one in _storages(value)}
            at = stream.tell()
        for key in keys:
            numel = int.from_bytes(bytes(self._data[at : at + 8]), "little")
            size = numel * sizes.get(key, 1)
            if at + 8 + size > len(self._data):
                raise CorruptCheckpoint(f"{self.path} is cut: a storage of {size} bytes begins at {at}")
            self._starts[key] = at + 8, size
            at += 8 + size
        return value


class _Window(io.RawIOBase):
    """Mapped bytes as a file that is read in parts."""

    def __init__(self, data: np.ndarray) -> None:
        self._data, self._at = data, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._data)}[whence]
        self._at = max(0, start + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, target: Any) -> int:
        part = self._data[self._at : self._at + len(target)]
        target[: len(part)] = part.tobytes()
        self._at += len(part)
        return len(part)


def _is_contiguous(tensor: Strided) -> bool:
    step = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride)):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


def _storages(value: Any) -> list[Storage]:
    """The storages of all tensors in a tree, each part of which is looked at once, even if it holds itself."""
    found, left, seen = [], [value], set[int]()
    while left:
        one = left.pop()
        if isinstance(one, Strided):
            found.append(one.storage)
        elif isinstance(one, Mapping | list | tuple) and id(one) not in seen:
            seen.add(id(one))
            left += one.values() if isinstance(one, Mapping) else one
    return found
