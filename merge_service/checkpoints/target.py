"""Where a merged model is written: a file, shards with an index, or a directory that open_clip or a library of Hugging Face opens."""

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from merge_service.checkpoints.adapters.references import is_adapter, parts_of
from merge_service.checkpoints.checkpoint import CONFIG_FILE, locate
from merge_service.checkpoints.configurations import check_alike
from merge_service.checkpoints.folders.companions import Folder
from merge_service.checkpoints.folders.kinds import CONFIG, STANDARD
from merge_service.checkpoints.header import TensorInfo
from merge_service.checkpoints.shards import (
    INDEX_SUFFIX,
    SHARD,
    SHARD_BYTES,
    ShardedWriter,
    SingleWriter,
    split,
)
from merge_service.checkpoints.views.cast import Cast, cast
from merge_service.checkpoints.views.view import View
from merge_service.checkpoints.weights import Weights
from merge_service.checkpoints.writer import Layout, Writer
from merge_service.errors import CheckpointError
from merge_service.files.digest import Digest
from merge_service.files.leftovers import sweep_parts


class Laid(Protocol):
    """Anything with the layout of a model, such as `Weights`."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...


@dataclass(frozen=True)
class Target:
    """Where a merged model is written, and the files that go with it.

    `weights` is the path of the single file. With `shard_bytes`, a larger model is written as shards with an index; with
    `indexed`, any model is. The form that is written replaces the other. `hashed`: writers hash what they write. `dtype` is that
    of the floats, that of the merge's reference if it is None.
    """

    path: Path
    weights: Path
    folder: Folder | None
    shard_bytes: int | None = None
    indexed: bool = False
    hashed: bool = False
    dtype: str | None = None

    @classmethod
    def of(
        cls,
        out: Path | str,
        sources: Sequence[Path | str],
        shard_bytes: int | None = None,
        tokenizer: Path | None = None,
    ) -> "Target":
        """A file or an index by the suffix of `out`, else a directory of the kind that the first source with a configuration is.

        `sources` are in the order in which they are asked for files that go with the weights; those of a tokenizer come from
        `tokenizer` first. Raises `CheckpointError` if none
        has a configuration, or if `out` is the directory of one of them.
        """
        path, given = Path(out), [part for source in sources for part in parts_of(source)]
        if path.name.endswith(".safetensors" + INDEX_SUFFIX):
            return cls(path, _single(path), None, SHARD_BYTES if shard_bytes is None else shard_bytes, True)
        if path.name.endswith(".safetensors"):
            return cls(path, path, None, shard_bytes)
        folder = Folder.of(given, tokenizer)
        if folder is None:
            raise CheckpointError(
                f"cannot tell how to write {path}: name a .safetensors file, or give inputs that are directories with "
                f"{CONFIG} or {CONFIG_FILE} to get such a directory"
            )
        if folder.is_open_clip:
            check_alike(given)
        elif any((one if one.is_dir() else one.parent).resolve() == path.resolve() for one in given):
            raise CheckpointError(f"{path} is the directory of an input; give another one for the result")
        return cls(path, path / f"{folder.name}.safetensors", folder, shard_bytes)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about the files beside the weights."""
        return self.folder.notes if self.folder else ()

    def reference(self, weights: Weights) -> Weights:
        """The reference of a merge that is written here: widened if another dtype is wanted than it has."""
        infos = weights.tensors.values()
        narrow = any(cast(info, self.dtype) != info.dtype and info.kind.itemsize < 4 for info in infos)
        return View.widened(weights) if narrow else weights

    def place(self, reference: Laid) -> Path:
        """The path to open for reading a model with the layout of `reference`: the directory, the index, or the file."""
        if self.folder is not None or (len(self.parts(reference.tensors)) == 1 and not self.indexed):
            return self.path
        return self.weights.with_name(self.weights.name + INDEX_SUFFIX)

    @contextlib.contextmanager
    def open(self, reference: Laid, metadata: dict[str, str], durable: bool = True) -> Iterator[Writer]:
        """A writer with the layout of `reference`; the files beside the weights are written before these appear. `durable` as of
        `CheckpointWriter`; the index of shards is durable always."""
        sweep_parts(self.weights)
        tensors = reference.tensors
        parts = self.parts(tensors)
        writer: SingleWriter | ShardedWriter
        if len(parts) == 1 and not self.indexed:
            digest = Digest() if self.hashed else None
            writer = SingleWriter(self.weights, parts[0], metadata, digest, durable)
        else:
            writer = ShardedWriter(self.weights, parts, metadata, self.hashed, durable)
        with writer:
            yield self.casting(writer, tensors)
            self.write_companions(tensors)

    def casting(self, writer: Writer, tensors: Mapping[str, TensorInfo]) -> Writer:
        """A writer that takes blocks as a merge with these tensors computes them."""
        return writer if self.dtype is None else Cast(writer, tensors, self.dtype)

    def write_companions(self, tensors: Mapping[str, TensorInfo]) -> None:
        """Write the files beside the weights, if the target is a directory."""
        if self.folder is not None:
            self.folder.write(self.path, _usual(tensors, self.dtype))

    def parts(self, tensors: Mapping[str, TensorInfo]) -> list[Layout]:
        """The layouts of the files, in order."""
        layout = {name: (cast(info, self.dtype), info.shape) for name, info in tensors.items()}
        return [layout] if self.shard_bytes is None else split(layout, self.shard_bytes)


def _usual(tensors: Mapping[str, TensorInfo], dtype: str | None) -> str | None:
    """The dtype of most floats that are written."""
    sizes: Counter[Any] = Counter()
    for info in tensors.values():
        sizes[cast(info, dtype)] += info.numel if info.kind.is_float else 0
    return sizes.most_common(1)[0][0] if sizes.total() else None


def overwrites(out: Path, source: Path) -> bool:
    """Whether writing `out` would destroy the checkpoint `source`. Raises `CheckpointError` if `source` does not exist."""
    return any(_overwrites(out, part) for part in parts_of(source))


def _overwrites(out: Path, source: Path) -> bool:
    if source.is_dir() and is_adapter(source):
        return out.resolve() == source.resolve()
    held = locate(source)
    named = out.name.endswith((".safetensors", ".safetensors" + INDEX_SUFFIX))
    targets = [out] if named else [out / f"{name}.safetensors" for name in STANDARD]
    return any(
        _single(target).resolve() == _single(held).resolve() or (target.exists() and target.samefile(held))
        for target in targets
    )


def _single(path: Path) -> Path:
    """The single file that an index or a shard belongs to."""
    return path.with_name(SHARD.sub(".safetensors", path.name.removesuffix(INDEX_SUFFIX)))
