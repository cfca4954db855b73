"""Checkpoints of torch.distributed.checkpoint: a directory with .metadata and a file of pieces from each rank, as FSDP2 and torchtitan
save them, and Megatron's `torch_dist`.

`.metadata` is a pickle; the machine reads it with the names of `RECORDS`, as plain values. A piece is a small archive of torch inside
its rank's file, and is read on its own: a tensor is put together piece by piece, and no file is read as a whole.

Invariant: every element of a tensor comes from exactly one piece.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from merge_service.checkpoints.pickled.archive import Archive
from merge_service.checkpoints.pickled.machine import NUMBERS, RECORDS, Name, Record, Strided, read
from merge_service.errors import CheckpointError, CorruptCheckpoint

METADATA = ".metadata"
MODELS = ("model", "state_dict", "model_state_dict", "module", "app", "ema", "params", "weights", "net")
"""Entries of what was saved that may be the model."""
_OTHERS = ("optim", "optimizer", "optimizers", "optimizer_state_dict", "lr_scheduler", "lr_schedulers", "scheduler", "dataloader", "train_state",
           "rng_state", "extra_state")  # fmt: skip
_LIMIT = 1 << 30


@dataclass(frozen=True)
class Piece:
    """A box of a tensor: its first index and size along each axis, and its place in a file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    part: tuple[int, int]


@dataclass(frozen=True)
class Assembled:
    """A tensor of a distributed checkpoint: dtype and shape, and its pieces."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    def spans(self) -> Iterator[tuple[int, np.ndarray]]:
        """Runs of stored elements with the place of their first element in the flattened tensor, one piece in memory at a time."""
        for piece in self.pieces:
            values = _values(piece, self.dtype)
            yield from _runs(piece, self.shape, values)


def is_distributed(source: Path) -> bool:
    """Whether this is the directory of a distributed checkpoint."""
    return source.is_dir() and (source / METADATA).is_file()


def distributed(source: Path, key: str | None, notes: list[str]) -> dict[str, Assembled]:
    """The model's tensors by name. `key` is the entry of the model in what was saved, if it is not found.

    Raises `CheckpointError` for classes that are no part of such a description, if the model cannot be told from the rest, or if
    pieces are missing or overlap.
    """
    path = source / METADATA
    if path.stat().st_size > _LIMIT:
        raise CorruptCheckpoint(f"{path} is above the limit of {_LIMIT} bytes")
    with path.open("rb") as stream:
        tree = read(stream, path, RECORDS)
    try:
        return _described(tree, source, key, notes)
    except (AttributeError, IndexError, KeyError, TypeError):
        raise CorruptCheckpoint(
            f"{path} does not describe a checkpoint of torch.distributed.checkpoint"
        ) from None


def _described(tree: Any, source: Path, key: str | None, notes: list[str]) -> dict[str, Assembled]:
    """The model's tensors in a description; what it lacks raises as a lookup does."""
    path = source / METADATA
    if not isinstance(tree, Record) or not isinstance(tree.part("state_dict_metadata"), Mapping):
        raise CorruptCheckpoint(f"{path} does not describe a checkpoint of torch.distributed.checkpoint")
    held = {
        str(name): one
        for name, one in tree.part("state_dict_metadata").items()
        if isinstance(one, Record) and one.name == "TensorStorageMetadata"
    }
    paths = tree.part("planner_data") if isinstance(tree.part("planner_data"), Mapping) else {}
    names = _model({name: tuple(paths.get(name, (name,))) for name in held}, source, key, notes)
    places = _places(tree.part("storage_data"), source, path)
    return {name: _assembled(held[flat], places.get(flat, {}), flat, source) for name, flat in names.items()}


def _model(
    paths: Mapping[str, tuple[Any, ...]], source: Path, key: str | None, notes: list[str]
) -> dict[str, str]:
    """The names of the model's tensors, each with its flat name in the checkpoint."""
    wanted = tuple(key.split(".")) if key else None
    tops = {str(path[0]) for path in paths.values() if len(path) > 1}
    plain = {flat for flat, path in paths.items() if len(path) == 1 and flat.split(".")[0] not in _OTHERS}
    if wanted is None:
        inside = [top for top in MODELS if top in tops]
        if plain or len(inside) != 1:
            if not plain or inside:
                raise CheckpointError(
                    f"{source}: cannot tell which entry is the model; choose with --key among {_some([*tops, *plain])}"
                )
            return {flat: flat for flat in paths if flat in plain}
        wanted = (inside[0],)
        left = sorted(tops - {inside[0]})
        notes.append(
            f"taken from {source.name}: {inside[0]}" + (f"; left: {', '.join(left[:5])}" if left else "")
        )
    found = {}
    for flat, path in paths.items():
        parts = tuple(str(one) for one in path) if len(path) > 1 else tuple(flat.split("."))
        if parts[: len(wanted)] == wanted and len(parts) > len(wanted):
            found[".".join(parts[len(wanted) :])] = flat
    if not found:
        raise CheckpointError(
            f"{source} has no tensors under {key!r}; it has {_some(sorted(tops) or sorted(paths))}"
        )
    return found


def _some(names: Sequence[str]) -> str:
    return ", ".join(sorted(set(names))[:8]) or "none"


def _places(
    stored: Any, source: Path, path: Path
) -> dict[str, dict[tuple[int, ...], tuple[Path, tuple[int, int]]]]:
    """The file and part of every piece, by name and offset."""
    found: dict[str, dict[tuple[int, ...], tuple[Path, tuple[int, int]]]] = {}
    if not isinstance(stored, Mapping):
        raise CorruptCheckpoint(
            f"{path} does not say where its tensors are; files of this kind of storage cannot be read"
        )
    for index, info in stored.items():
        if not isinstance(index, Record) or not isinstance(info, Record) or info.name != "_StorageInfo":
            raise CorruptCheckpoint(f"{path} has an entry that is no place in a file")
        file, start, size = info.part("relative_path"), info.part("offset"), info.part("length")
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{path} points outside its own directory: {str(file)[:100]!r}")
        if type(start) is not int or type(size) is not int or info.part("transform_descriptors"):
            raise CheckpointError(
                f"{path} has pieces that are compressed or otherwise transformed; save them without extensions"
            )
        offset = index.part("offset")
        found.setdefault(str(index.part("fqn")), {})[tuple(offset or ())] = (source / file, (start, size))
    return found


def _assembled(
    one: Record, places: Mapping[tuple[int, ...], tuple[Path, tuple[int, int]]], name: str, source: Path
) -> Assembled:
    """A tensor with its pieces. Raises `CorruptCheckpoint` if they do not cover it exactly."""
    shape, chunks, properties = one.part("size"), one.part("chunks"), one.part("properties")
    dtype = properties.part("dtype") if isinstance(properties, Record) else None
    if (
        dtype is None
        and isinstance(properties, Record)
        and isinstance(properties.state, tuple)
        and properties.state
    ):
        dtype = properties.state[0]
    if not isinstance(dtype, Name) or dtype.name not in NUMBERS:
        raise CorruptCheckpoint(f"{source}: {name} has no known dtype")
    pieces, covered, corners = [], 0, set[tuple[int, ...]]()
    for chunk in chunks if isinstance(chunks, list) else ():
        offsets, sizes = tuple(chunk.part("offsets")), tuple(chunk.part("sizes"))
        numbers = (*offsets, *sizes)
        inside = len(offsets) == len(sizes) == len(shape) and all(type(n) is int and n >= 0 for n in numbers)
        if not inside or any(a + b > c for a, b, c in zip(offsets, sizes, shape)):
            raise CorruptCheckpoint(f"{source}: a piece of {name} lies outside of its shape {list(shape)}")
        if not math.prod(sizes):
            continue
        if offsets in corners or offsets not in places:
            raise CorruptCheckpoint(
                f"{source}: the piece of {name} at {list(offsets)} is {'twice there' if offsets in corners else 'missing'}"
            )
        corners.add(offsets)
        covered += math.prod(sizes)
        pieces.append(Piece(offsets, sizes, *places[offsets]))
    if covered != math.prod(shape):
        raise CorruptCheckpoint(
            f"{source}: the pieces of {name} hold {covered} of its {math.prod(shape)} elements"
        )
    if (twice := _overlapping(pieces)) is not None:
        raise CorruptCheckpoint(
            f"{source}: the piece of {name} at {list(twice.offsets)} overlaps another, so others are missing"
        )
    return Assembled(NUMBERS[dtype.name], tuple(shape), tuple(pieces))


def _overlapping(pieces: Sequence[Piece]) -> Piece | None:
    """A piece that shares an element with another; None if none does. Linear in pieces that are cut along one axis."""
    if len(pieces) < 2:
        return None
    axis = max(range(len(pieces[0].offsets)), key=lambda at: len({one.offsets[at] for one in pieces}))
    near: list[Piece] = []
    for piece in sorted(pieces, key=lambda one: one.offsets[axis]):
        near = [one for one in near if one.offsets[axis] + one.sizes[axis] > piece.offsets[axis]]
        if any(_meet(one, piece) for one in near):
            return piece
        near.append(piece)
    return None


def _meet(one: Piece, other: Piece) -> bool:
    spans = zip(one.offsets, one.sizes, other.offsets, other.sizes)
    return all(a < b + more and b < a + size for a, size, b, more in spans)


def _values(piece: Piece, dtype: str) -> np.ndarray:
    """The stored elements of a piece, in a row."""
    if not piece.file.is_file():
        raise CheckpointError(f"{piece.file} is missing; copy the files of all ranks")
    archive = Archive(piece.file, piece.part)
    tensor = archive.value
    if (
        not isinstance(tensor, Strided)
        or tensor.storage.dtype != dtype
        or math.prod(tensor.shape) != math.prod(piece.sizes)
    ):
        raise CorruptCheckpoint(
            f"{piece.file}: what lies at byte {piece.part[0]} is not the piece that .metadata describes"
        )
    return archive.stored(tensor)


def _runs(piece: Piece, shape: tuple[int, ...], values: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """A piece as runs that are contiguous in the whole tensor."""
    axis = len(shape)
    while axis > 0 and piece.sizes[axis - 1] == shape[axis - 1]:
        axis -= 1
    inner = max(axis - 1, 0)
    length = math.prod(piece.sizes[inner:])
    steps = [math.prod(shape[at + 1 :]) for at in range(len(shape))]
    for number, index in enumerate(product(*(range(size) for size in piece.sizes[:inner]))):
        place = (*(a + b for a, b in zip(index, piece.offsets)), *piece.offsets[inner:])
        start = sum(at * step for at, step in zip(place, steps))
        yield start, values[number * length : (number + 1) * length]
