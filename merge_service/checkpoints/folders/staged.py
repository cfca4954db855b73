"""The shards of a model that are made one after another in a hidden folder, and get their names together.

A merge that takes hours is stopped, and given again: it finds the shards that are whole and goes on with the next one. The folder lies
beside the shards, so that naming them is a rename. Its name is a digest of everything that the model is made of; another merge into the
same place, or another version, does not find it and removes it.

Invariant: a shard counts as made only if it is whole and on the disk with what was noted of it; the model at the target is the old one
until every shard is made.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from merge_service.checkpoints.folders.shardwise import Shardwise
from merge_service.checkpoints.header import TensorInfo
from merge_service.checkpoints.writer import CheckpointWriter
from merge_service.errors import CheckpointError
from merge_service.faults import point
from merge_service.files.leftovers import OWNER, is_abandoned, owner_mark, parts_folder, sweep, sweep_parts
from merge_service.files.sync import sync_directory
from merge_service.files.whole import prepared


class Staged:
    """The shards of `files`, made in a folder of their own; `identity` is everything that bears on their bytes."""

    def __init__(self, files: Shardwise, identity: str) -> None:
        self.of, self.count = files, len(files.parts)
        said = json.dumps([identity, files.metadata, [list(part.items()) for part in files.parts]])
        self.place = parts_folder(files.target.weights, hashlib.sha256(said.encode()).hexdigest()[:16])

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """The folder, of this process alone. It stays if something was made and the process ends or a disk fails, and goes with a mistake of the
        user's.

        Raises `CheckpointError` if another process makes the same model there, OSError if what is left to be made does not fit the disk.
        """
        for taken in (self.of.target.weights, *self.of.files):
            if taken.is_dir():
                raise CheckpointError(f"cannot write {taken}: it is a directory; name a file")
        sweep(self.of.target.weights)
        sweep_parts(self.of.target.weights, keep=self.place)
        self.place.mkdir(parents=True, exist_ok=True)
        owner = self.place / OWNER
        with contextlib.suppress(FileNotFoundError):
            mark = owner.read_text()
            if mark != owner_mark() and not is_abandoned(mark, 0.0):
                raise CheckpointError(
                    f"another process is writing {self.of.files[0].parent} now; wait for it, or give another --out"
                )
        owner.write_text(owner_mark())
        left = sum(_size(self.of.parts[at]) for at in range(self.count) if self.noted(at) is None)
        if shutil.disk_usage(self.place).free < left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.place))
        try:
            yield
        except BaseException as error:
            if isinstance(error, CheckpointError) or all(self.noted(at) is None for at in range(self.count)):
                shutil.rmtree(self.place, ignore_errors=True)
            raise

    def tensors(self, at: int) -> frozenset[str]:
        """The names in a shard."""
        return frozenset(self.of.parts[at])

    def noted(self, at: int) -> dict[str, Any] | None:
        """What was noted of a shard that is made; None for one that is not."""
        try:
            note: dict[str, Any] = json.loads(self._note(at).read_bytes())
        except (OSError, ValueError):
            return None
        return note if self.of.is_made(at, self._file(at)) or self.of.is_made(at) else None

    def writer(self, at: int) -> CheckpointWriter:
        """A writer of a shard; what was noted of it before is forgotten."""
        self._note(at).unlink(missing_ok=True)
        return CheckpointWriter(self._file(at), self.of.parts[at], self.of.metadata)

    def note(self, at: int, what: Mapping[str, Any]) -> None:
        """Note that a shard is made, durably."""
        with prepared(self._note(at), json.dumps(what)) as whole:
            whole.replace(self._note(at))
        sync_directory(self.place)
        point("shards.made")

    def publish(self) -> None:
        """Give all shards their names, and write the files beside them and the index. An older model goes first."""
        self.of.target.write_companions(self.of.tensors)
        point("shards.settled")
        self.of.forget_index()
        for at, file in enumerate(self.of.files):
            if self._file(at).exists():
                self._file(at).replace(file)
            point("shards.published")
        sync_directory(self.of.files[0].parent)
        self.of.finish(companions=False)
        shutil.rmtree(self.place, ignore_errors=True)

    def _file(self, at: int) -> Path:
        return self.place / self.of.files[at].name

    def _note(self, at: int) -> Path:
        return self.place / f"{at + 1:05d}.json"


def _size(layout: Mapping[str, Any]) -> int:
    return sum(TensorInfo(dtype, tuple(shape), 0).nbytes for dtype, shape in layout.values())
