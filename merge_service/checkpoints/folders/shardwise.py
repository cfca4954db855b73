"""A model whose files are made one after another, so that a writer that was stopped goes on with the next file.

`Target.open` publishes all shards of a model together. Where several models are made in one pass, or a pass takes hours, each shard
gets its name as soon as it is complete. Its metadata says what it was made of, so no journal is needed: a shard of the same metadata
and layout is finished, any other is made anew. The index is written last.

Invariant: an index exists only while all shards that it names are complete and have the same metadata.
"""

from collections.abc import Mapping
from pathlib import Path

from merge_service.checkpoints.header import read_header
from merge_service.checkpoints.shards import INDEX_SUFFIX, index_text, remove_shards, shard_paths, write_index
from merge_service.checkpoints.target import Laid, Target
from merge_service.checkpoints.writer import CheckpointWriter
from merge_service.errors import CheckpointError
from merge_service.files.sync import sync_directory


class Shardwise:
    """The files of a model with the layout of `reference` at `target`; `metadata` identifies what it is made of."""

    def __init__(self, target: Target, reference: Laid, metadata: Mapping[str, str]) -> None:
        self.target, self.metadata = target, dict(metadata)
        self.tensors = reference.tensors
        self.parts = target.parts(reference.tensors)
        self.is_sharded = len(self.parts) > 1 or target.indexed
        self.files = shard_paths(target.weights, len(self.parts)) if self.is_sharded else [target.weights]
        self._index = target.weights.with_name(target.weights.name + INDEX_SUFFIX)
        self._text = index_text(self.files, self.parts) if self.is_sharded else ""

    @property
    def missing(self) -> list[int]:
        """The files that are not there yet, by their place in `parts`."""
        return [at for at in range(len(self.parts)) if not self.is_made(at)]

    def writer(self, at: int) -> CheckpointWriter:
        """A writer of one file. What an older index or file of the same name says is no longer true: both are removed."""
        self.forget_index()
        return CheckpointWriter(self.files[at], self.parts[at], self.metadata)

    def forget_index(self) -> None:
        """Remove the index of an older model, durably."""
        if self._index.exists():
            self._index.unlink()
            sync_directory(self._index.parent)

    def finish(self, companions: bool = True) -> Path:
        """Write the files beside the weights and the index, and remove another form of the same name; the path to read."""
        if companions:
            self.target.write_companions(self.tensors)
        if not self.is_sharded:
            self._index.unlink(missing_ok=True)
            remove_shards(self.target.weights, keep=set())
        elif not self._is_indexed():
            write_index(self._index, self._text)
        if self.is_sharded:
            self.target.weights.unlink(missing_ok=True)
            remove_shards(self.target.weights, keep={file.name for file in self.files})
        return self.target.place(_Laid(self.tensors))

    def _is_indexed(self) -> bool:
        return self._index.is_file() and self._index.read_text(encoding="utf-8") == self._text

    def is_made(self, at: int, file: Path | None = None) -> bool:
        """Whether the file, by default under its name, is there, whole, of this layout, and made of the same."""
        file = file or self.files[at]
        if not file.is_file():
            return False
        try:
            tensors, metadata = read_header(file)
        except CheckpointError:
            return False
        layout = {name: (dtype, tuple(shape)) for name, (dtype, shape) in self.parts[at].items()}
        return metadata == self.metadata and layout == {n: (i.dtype, i.shape) for n, i in tensors.items()}


class _Laid:
    def __init__(self, tensors: Mapping) -> None:
        self.tensors = tensors
