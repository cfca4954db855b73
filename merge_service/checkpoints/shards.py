"""A checkpoint in several files, as Hugging Face lays it out: NAME-00001-of-0000N.safetensors and NAME.safetensors.index.json.

Whole tensors go to shards in header order; `metadata.total_size` counts the bytes of tensors, `weight_map` names the file of
each. All shards are complete and on disk before any is renamed. An older index of the same name is removed first and the new one
is written last, so an index that exists points at the shards it was written with. A crash in between leaves no index.

Invariant: the index exists only while every shard it names is complete and of the same merge.
"""

import json
import re
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from merge_service.checkpoints.header import TensorInfo, check_readable
from merge_service.checkpoints.writer import CheckpointWriter, Layout
from merge_service.errors import CheckpointError
from merge_service.faults import point
from merge_service.files.digest import Digest
from merge_service.files.sync import sync_directory
from merge_service.files.whole import prepared

INDEX_SUFFIX = ".index.json"
SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
SHARD_BYTES = 5 * 10**9
"""Bytes of a shard if an index is requested without a size: the long-standing default of Hugging Face."""
MOST = 500
"""Most shards of a checkpoint."""
OPEN = 8
"""Most shards that are open files at a time while they are written."""
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class ShardedWriter:
    """Writes `parts` (the layout of each shard) under the name of `path`, NAME.safetensors; used as a `CheckpointWriter`."""

    def __init__(
        self,
        path: Path,
        parts: list[Layout],
        metadata: Mapping[str, str],
        hashed: bool = False,
        durable: bool = True,
    ) -> None:
        self.path = path
        self.index = path.with_name(path.name + INDEX_SUFFIX)
        for place in (self.index, self.path):
            if place.is_dir():
                raise CheckpointError(f"cannot write {place}: it is a directory; name a file")
        self._writers: list[CheckpointWriter] = []
        self._of: dict[str, CheckpointWriter] = {}
        self._lock = threading.Lock()
        self._in_use: Counter[CheckpointWriter] = Counter()
        shards = shard_paths(path, len(parts))
        self._text = index_text(shards, parts)
        try:
            for shard, layout in zip(shards, parts):
                self._writers.append(
                    CheckpointWriter(shard, layout, metadata, Digest() if hashed else None, durable)
                )
                self._of |= dict.fromkeys(layout, self._writers[-1])
                self._rest()
        except BaseException:
            self.abort()
            raise

    @property
    def files(self) -> list[CheckpointWriter]:
        """The writers of the shards."""
        return self._writers

    def write_stored(self, name: str, start: int, stored: np.ndarray) -> None:
        """As `CheckpointWriter.write_stored`, into the tensor's shard."""
        writer = self._of[name]
        with self._lock:
            self._in_use[writer] += 1
            writer.wake()
        try:
            writer.write_stored(name, start, stored)
        finally:
            with self._lock:
                self._in_use[writer] -= 1
                self._rest()

    def close(self) -> None:
        """Publish the shards and then the index under their names, and remove older files of that name."""
        for writer in self._writers:
            writer.settle()
        point("shards.settled")
        self.index.unlink(missing_ok=True)
        sync_directory(self.path.parent)
        for writer in self._writers:
            writer.publish()
            point("shards.published")
        self._write_index()
        self.path.unlink(missing_ok=True)
        remove_shards(self.path, keep={writer.path.name for writer in self._writers})

    def abort(self) -> None:
        """Remove temporary files."""
        for writer in self._writers:
            writer.abort()

    def _rest(self) -> None:
        """Close files that no thread writes to at the moment, in order, until at most `OPEN` are open."""
        awake = [writer for writer in self._writers if writer.awake]
        for writer in awake[: max(0, len(awake) - OPEN)]:
            if not self._in_use[writer]:
                writer.rest()

    def _write_index(self) -> None:
        write_index(self.index, self._text)

    def __enter__(self) -> "ShardedWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self.abort()


class SingleWriter(CheckpointWriter):
    """Writes NAME.safetensors as one file, which replaces shards of that name: their index is removed first."""

    def publish(self) -> None:
        """As of `CheckpointWriter`; a crash on the way leaves the new model or none, never the old one as the newest."""
        index = self.path.with_name(self.path.name + INDEX_SUFFIX)
        if index.is_file():
            index.unlink(missing_ok=True)
            sync_directory(self.path.parent)
            point("single.before_publish")
        super().publish()
        remove_shards(self.path, keep=set())


def shard_paths(path: Path, count: int) -> list[Path]:
    """The files of `count` shards under the name of `path`, NAME.safetensors."""
    stem = path.name.removesuffix(".safetensors")
    return [
        path.with_name(f"{stem}-{number:05d}-of-{count:05d}.safetensors") for number in range(1, count + 1)
    ]


def index_text(shards: Sequence[Path], parts: Sequence[Layout]) -> str:
    """The index of shards with these layouts. Raises `CheckpointError` if it would be too large to be read."""
    where = {name: shard.name for shard, layout in zip(shards, parts) for name in layout}
    total = sum(TensorInfo(d, tuple(s), 0).nbytes for layout in parts for d, s in layout.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n"
    check_readable(text.encode(), f"{len(where)} tensors in an index")
    return text


def write_index(index: Path, text: str) -> None:
    """Write the index whole, durably, after its shards."""
    with prepared(index, text) as whole:
        point("shards.before_index")
        whole.replace(index)
    sync_directory(index.parent)


def split(layout: Layout, shard_bytes: int) -> list[Layout]:
    """The layout cut into shards of at most `shard_bytes` bytes of tensors; a larger tensor is a shard of its own.

    Raises `CheckpointError` if the size is not positive, or gives more than `MOST` shards.
    """
    if shard_bytes < 1:
        raise CheckpointError(f"shards of {shard_bytes} bytes can hold nothing; give a size above zero")
    parts: list[dict] = [{}]
    held = 0
    for name, (dtype, shape) in layout.items():
        size = TensorInfo(dtype, tuple(shape), 0).nbytes
        if parts[-1] and held + size > shard_bytes:
            parts.append({})
            held = 0
        parts[-1][name] = (dtype, shape)
        held += size
    if len(parts) > MOST:
        raise CheckpointError(
            f"shards of {shard_bytes} bytes would be {len(parts)} files, more than {MOST}; make them larger"
        )
    return list(parts)


def remove_shards(path: Path, keep: set[str]) -> None:
    """Remove shards of the name of `path` that no index names, except those in `keep`."""
    for file in path.parent.iterdir():
        if (
            SHARD.search(file.name)
            and SHARD.sub(".safetensors", file.name) == path.name
            and file.name not in keep
        ):
            file.unlink(missing_ok=True)


def bytes_of(size: str) -> int:
    """5GB, 500MB, 1.5 GB or a plain number of bytes, in decimal units as Hugging Face counts. Raises `CheckpointError`."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?B)?\s*", size.upper())
    number = int(float(found[1]) * _UNITS[found[2] or "B"]) if found else 0
    if number < 1:
        raise CheckpointError(f"{size!r} is not a size; write for instance 5GB or 500MB (decimal units)")
    return number
