"""A model that an adapter makes of its base, as weights: only the tensors that the adapter changes differ from the base's.

Invariant: nothing is made before it is read, and no more of it is held than a group of rows per thread. What is not changed is the
base's own memory.
"""

import hashlib
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import numpy as np

from merge_service.checkpoints.adapters.updates import Update, group_of
from merge_service.checkpoints.checkpoint import Checkpoint
from merge_service.checkpoints.dtypes import encode
from merge_service.checkpoints.folders.kinds import ADAPTER_CONFIG
from merge_service.checkpoints.views.view import View
from merge_service.checkpoints.weights import Weights

_lock = threading.RLock()  # an adapter may stand on an adapted base, whose own base is hashed meanwhile
_digests: dict[tuple[str, tuple[tuple[str, int, int], ...]], tuple[str, str]] = {}
"""Digests of bases, by fingerprint, files, sizes and times: many adapters share a base, which is hashed once."""


class Adapted(View):
    """`base` with `updates` by name. Changed floats of less than 32 bits are float32 here: they are made in it, and rounding them to
    the base's type would lose most of a small update. `path` is the adapter's file, `source` opens both again from
    any directory, `notes` are what the user should know.
    """

    def __init__(
        self,
        base: Weights,
        adapter: Checkpoint,
        updates: Mapping[str, Update],
        path: Path,
        notes: tuple[str, ...] = (),
    ) -> None:
        super().__init__(base, {name: name for name in base.tensors})
        self.path, self.files = adapter.path, [*base.files, *adapter.files]
        self.source, self.notes, self.updates = path, notes, dict(updates)
        self._adapter = adapter
        self._last = threading.local()
        for name, info in self.tensors.items():
            there, _ = self._at[info.offset]
            if updates.get(name) is not updates.get(there):  # one tensor of the base, two here
                self._at.append((name, 1.0))
                self.tensors[name] = replace(info, offset=len(self._at) - 1)
        for name in updates:
            held = self.tensors.get(name)
            if held is None:
                info = adapter.tensors[name]
                self._at.append((name, 1.0))
                self.tensors[name] = replace(info, shard=0, offset=len(self._at) - 1)
            elif held.kind.is_float and held.kind.itemsize < 4:
                self.tensors[name] = replace(held, dtype="F32")

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """As of `Weights`: what is changed is made here and not rounded to the base's type."""
        there, _ = self._at[self.tensors[name].offset]
        update = self.updates.get(there)
        return self.of.read(there, start, stop) if update is None else self._made(there, update, start, stop)

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """As of `Weights`."""
        info = self.tensors[name]
        there, _ = self._at[info.offset]
        return (
            encode(self.read(name, start, stop), info.kind)
            if there in self.updates
            else self.of.raw(there, start, stop)
        )

    def address(self, name: str) -> int | None:
        """As of `Weights`."""
        there, _ = self._at[self.tensors[name].offset]
        return None if there in self.updates else self.of.address(there)

    def fingerprint(self) -> str:
        """Of both, and of how the adapter is applied."""
        said = (self.of.fingerprint(), self._adapter.fingerprint(), _configuration(self._adapter.path))
        return hashlib.sha256("".join(said).encode()).hexdigest()

    def digests(self) -> tuple[str, str]:
        """As of `Weights`; the base is hashed once per process, however many adapters it has."""
        said = _configuration(self._adapter.path)
        pairs = (_base_digests(self.of), self._adapter.digests())
        content, sha256 = (
            hashlib.sha256("".join([*parts, said]).encode()).hexdigest() for parts in zip(*pairs)
        )
        return content, sha256

    def close(self) -> None:
        """Release the files; arrays that were read stay valid."""
        self._adapter.close()
        if isinstance(self.of, Checkpoint | Adapted):
            self.of.close()

    def __enter__(self) -> "Adapted":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _made(self, there: str, update: Update, start: int, stop: int | None) -> np.ndarray:
        rows, columns = update.shape
        first, last, _ = slice(start, stop).indices(rows * columns)
        if last <= first:
            return np.empty(0, np.float32)
        step = group_of(update.shape) * columns
        parts = []
        for group in range(first // step, -(-last // step)):
            made = self._group(there, update, group).reshape(-1)
            parts.append(made[max(first - group * step, 0) : last - group * step])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _group(self, there: str, update: Update, group: int) -> np.ndarray:
        """A group of rows; a thread keeps the one that it made last, because spans end inside groups."""
        key = (there, group)
        if getattr(self._last, "key", None) != key:
            rows, columns = update.shape
            step = group_of(update.shape)

            def before(first: int, last: int) -> np.ndarray:
                return self.of.read(there, first * columns, last * columns).reshape(-1, columns)

            made = update.rows(before, group * step, min((group + 1) * step, rows))
            made.flags.writeable = False
            self._last.key, self._last.made = key, made
        held: np.ndarray = self._last.made
        return held


def _configuration(file: Path) -> str:
    beside = file.parent / ADAPTER_CONFIG
    return hashlib.sha256(beside.read_bytes()).hexdigest() if beside.is_file() else ""


def _base_digests(base: Weights) -> tuple[str, str]:
    stats = [(str(file), file.stat()) for file in base.files]
    key = (base.fingerprint(), tuple((name, one.st_size, one.st_mtime_ns) for name, one in stats))
    with _lock:
        if key not in _digests:
            _digests[key] = base.digests()
        return _digests[key]
