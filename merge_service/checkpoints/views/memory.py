"""A model in memory as `Weights`, and a writer that keeps a merged one there.

A program that holds state dicts merges them as they are: nothing is copied to a disk, and tensors on the host are read in place.

Invariant: the numbers are those of a file of the same tensors, and so are digests and thus ids; what was given is never changed.
"""

import hashlib
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from merge_service.checkpoints.checkpoint import samples
from merge_service.checkpoints.dtypes import decode
from merge_service.checkpoints.header import TensorInfo, build_header
from merge_service.checkpoints.weights import Named
from merge_service.checkpoints.writer import CheckpointWriter, Layout, unwritten

Elements = np.ndarray | Callable[[], np.ndarray]
"""All elements of a tensor in a row, as stored in a file: an array that is read in place, or a function that makes it."""


class InMemory(Named):
    """`Weights` in arrays: `layout` has dtype and shape by name, `elements` the numbers. `path` is a name for messages.

    Elements that are made (copied from a device, or put in a row) are made again whenever they are read; a thread holds the last
    tensor that it made, so memory does not grow with the model.
    """

    def __init__(
        self, path: Path, layout: Layout, elements: Mapping[str, Elements], metadata: Mapping[str, str]
    ) -> None:
        self.files: list[Path] = []
        self._head, self._placed = build_header(
            {name: (dtype, tuple(shape)) for name, (dtype, shape) in layout.items()}, dict(metadata)
        )
        self._elements, self._last = dict(elements), threading.local()
        self._names = {(info.offset, info.numel > 0): name for name, info in self._placed.items()}
        super().__init__(path, self._placed, metadata)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """As of `Weights`."""
        return decode(self.raw(name, start, stop), self.tensors[name].kind)

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """As of `Weights`."""
        info = self.tensors[name]
        first, last, _ = slice(start, stop).indices(info.numel)
        if not info.numel:
            return np.empty(0, info.kind.storage)
        found = self._row(self._names[info.offset, True])[first : max(first, last)]
        found.flags.writeable = False
        return found

    def address(self, name: str) -> int | None:
        """As of `Weights`; None for elements that are made when they are read."""
        info = self.tensors[name]
        held = self._elements[self._names[info.offset, True]] if info.numel else None
        return held.ctypes.data if isinstance(held, np.ndarray) else None

    def fingerprint(self) -> str:
        """As of `Weights`."""
        digest = hashlib.sha256(self._head)
        for name, info in self._placed.items():
            for sample in samples(self._bytes(name) if info.numel else memoryview(b"")):
                digest.update(sample)
        return digest.hexdigest()

    def digests(self) -> tuple[str, str]:
        """As of `Weights`: those of a file that `CheckpointWriter` makes of the same."""
        digest, sums = hashlib.sha256(self._head), set[tuple[str, int, int]]()
        for name, info in sorted(self._placed.items(), key=lambda item: item[1].offset):
            data = self._bytes(name) if info.numel else b""
            digest.update(data)
            sums.add((info.dtype, info.numel, zlib.crc32(data)))
        return hashlib.sha256(repr(sorted(sums)).encode()).hexdigest(), digest.hexdigest()

    def _bytes(self, name: str) -> memoryview:
        return memoryview(np.ascontiguousarray(self._row(name)).view(np.uint8))  # type: ignore[arg-type]

    def _row(self, name: str) -> np.ndarray:
        held = self._elements[name]
        if isinstance(held, np.ndarray):
            return held.view()
        if getattr(self._last, "name", None) != name:
            self._last.name, self._last.made = name, held()
        made: np.ndarray = self._last.made
        return made.view()


class ArrayWriter:
    """A writer that keeps what is written: `arrays` has all elements of every tensor in a row, as stored."""

    def __init__(self, layout: Layout) -> None:
        self._infos = {name: TensorInfo(dtype, tuple(shape), 0) for name, (dtype, shape) in layout.items()}
        self.arrays = {name: np.empty(info.numel, info.kind.storage) for name, info in self._infos.items()}
        self._done: dict[tuple[str, int], int] = {}

    @property
    def files(self) -> Sequence[CheckpointWriter]:
        """None."""
        return ()

    def write_stored(self, name: str, start: int, stored: np.ndarray) -> None:
        """As of `Writer`."""
        flat = stored.reshape(-1)
        self.arrays[name][start : start + flat.size] = flat
        self._done[name, start] = flat.size

    def close(self) -> None:
        """Assert that every element was written."""
        missing = unwritten(self._done, self._infos)
        assert not missing, f"not every block of {missing[:3]} was written"
