"""Where a merged model goes: a file, shards with an index, or a directory that open_clip loads as it is."""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from merge_service.checkpoints.checkpoint import CONFIG_FILE, WEIGHTS_FILE, Checkpoint, locate
from merge_service.checkpoints.configurations import check_alike
from merge_service.checkpoints.shards import (
    INDEX_SUFFIX,
    SHARD,
    SHARD_BYTES,
    ShardedWriter,
    SingleWriter,
    split,
)
from merge_service.checkpoints.writer import Layout, Writer
from merge_service.errors import CheckpointError


@dataclass(frozen=True)
class Target:
    """Where a merged model goes, and the open_clip configuration that goes with it.

    `weights` is the name of the single file. With `shard_bytes` a model above that is written as shards beside an index;
    with `indexed` any model is. Whichever form is written then takes the place of the other.
    """

    path: Path
    weights: Path
    config: Path | None
    shard_bytes: int | None = None
    indexed: bool = False

    @classmethod
    def of(cls, out: Path | str, sources: Sequence[Path | str], shard_bytes: int | None = None) -> "Target":
        """A file or an index if the name says so, else a directory with the configuration of the first source with one."""
        path = Path(out)
        if path.name.endswith(".safetensors" + INDEX_SUFFIX):
            return cls(path, _single(path), None, SHARD_BYTES if shard_bytes is None else shard_bytes, True)
        if path.name.endswith(".safetensors"):
            return cls(path, path, None, shard_bytes)
        for source in sources:
            if (Path(source) / CONFIG_FILE).is_file():
                check_alike(sources)
                return cls(path, path / WEIGHTS_FILE, Path(source) / CONFIG_FILE, shard_bytes)
        raise CheckpointError(
            f"cannot tell how to write {path}: name a .safetensors file, or give inputs that are directories with "
            f"{CONFIG_FILE} to get such a directory"
        )

    def place(self, reference: Checkpoint) -> Path:
        """What to open to read a model shaped like `reference`: the directory, the index, or the file."""
        if self.config is not None or (len(self._parts(reference)) == 1 and not self.indexed):
            return self.path
        return self.weights.with_name(self.weights.name + INDEX_SUFFIX)

    @contextlib.contextmanager
    def open(self, reference: Checkpoint, metadata: dict[str, str]) -> Iterator[Writer]:
        """A writer shaped like `reference`; the configuration is there before the weights are."""
        parts = self._parts(reference)
        writer: SingleWriter | ShardedWriter
        if len(parts) == 1 and not self.indexed:
            writer = SingleWriter(self.weights, parts[0], metadata)
        else:
            writer = ShardedWriter(self.weights, parts, metadata)
        with writer:
            yield writer
            if self.config is not None and self.config.parent.resolve() != self.path.resolve():
                shutil.copyfile(self.config, self.path / CONFIG_FILE)

    def _parts(self, reference: Checkpoint) -> list[Layout]:
        layout = {name: (info.dtype, info.shape) for name, info in reference.tensors.items()}
        return [layout] if self.shard_bytes is None else split(layout, self.shard_bytes)


def overwrites(out: Path, source: Path) -> bool:
    """Whether writing `out` would destroy the checkpoint `source`. Raises `CheckpointError` when there is no such."""
    held = locate(source)
    named = out.name.endswith((".safetensors", ".safetensors" + INDEX_SUFFIX))
    target = out if named else out / WEIGHTS_FILE
    return _single(target).resolve() == _single(held).resolve() or (target.exists() and target.samefile(held))


def _single(path: Path) -> Path:
    """The single file that an index or a shard stands for."""
    return path.with_name(SHARD.sub(".safetensors", path.name.removesuffix(INDEX_SUFFIX)))
