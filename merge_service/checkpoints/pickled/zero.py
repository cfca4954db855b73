"""Folders in which DeepSpeed's ZeRO saves a model: the float32 weights lie flat in the optimizer files of all ranks.

Stages 1 and 2 cut the row of all parameters of a group into one part per rank. Stage 3 cuts every parameter into one part per rank.
Files of the model hold names, shapes, buffers and frozen parameters. All of them are pickles, which the machine reads as plain values;
numbers are mapped, and a tensor is copied out of the parts that hold it.

Invariant: a tensor has all of its elements, in order, or the folder is refused.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from merge_service.checkpoints.pickled.archive import Archive
from merge_service.checkpoints.pickled.machine import ZERO_RECORDS, Record, Strided
from merge_service.errors import CheckpointError, CorruptCheckpoint

_OPTIMIZER = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt$")
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt$")
Part = tuple[Archive, Strided]


@dataclass(frozen=True)
class Flat:
    """A tensor as parts of flat storages, in order."""

    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    def spans(self) -> Iterator[tuple[int, np.ndarray]]:
        """Runs of stored elements with the place of their first element in the flattened tensor."""
        start = 0
        for archive, part in self.parts:
            yield start, archive.stored(part)
            start += math.prod(part.shape)


def is_zero(source: Path) -> bool:
    """Whether this is a folder of a run with ZeRO, or one of its checkpoints."""
    return source.is_dir() and any(
        _OPTIMIZER.fullmatch(file.name) for file in _folder(source).glob("*_optim_states.pt")
    )


def zero(source: Path, notes: list[str]) -> dict[str, Flat]:
    """The model's tensors by name: trained ones in float32, frozen ones and buffers as they were kept. Tied names are one value.

    Raises `CheckpointError` for folders with tensor parallelism or experts of their own, and if files of ranks are missing.
    """
    try:
        return _together(source, notes)
    except (AttributeError, IndexError, KeyError, TypeError):
        raise CorruptCheckpoint(
            f"{source} does not hold what ZeRO saves: its files have other entries"
        ) from None


def _together(source: Path, notes: list[str]) -> dict[str, Flat]:
    """As of `zero`; an entry that is missing, or is something else, raises as a lookup does."""
    folder = _folder(source)
    if folder != source:
        notes.append(f"taken from {folder.name}, which is the latest")
    if any(folder.glob("*expert*_states.pt")) or any(folder.glob("layer_*_states.pt")):
        raise CheckpointError(
            f"{folder} has files of experts or pipeline layers, which are not put together; save a full state dict instead"
        )
    optimizers = _ranks(folder, _OPTIMIZER)
    models = _ranks(folder, _MODEL)
    states = [_of(archive.value, "optimizer_state_dict", archive.path) for archive in optimizers]
    stage = _number(states[0].get("zero_stage"))
    count = states[0].get("partition_count")
    world = max(count) if isinstance(count, list) and count else count
    if world != len(optimizers):
        raise CheckpointError(
            f"{folder} has the optimizer files of {len(optimizers)} ranks, and the run had {world}; copy the others too"
        )
    head = models[0].value
    shapes = [dict(group) for group in _list(head.get("param_shapes"), models[0].path)]
    if stage in (1, 2):
        found = _cut_by_group(optimizers, states, shapes)
    elif stage == 3:
        found = _cut_by_tensor(
            optimizers, states, {name: one for group in shapes for name, one in group.items()}
        )
    else:
        raise CheckpointError(f"{folder}: the ZeRO stage is {stage!r}; 1, 2 and 3 are read")
    found |= _frozen(models if stage == 3 else models[:1])
    module = head.get("module") or {}
    for name in head.get("buffer_names") or ():
        if isinstance(module.get(name), Strided):
            found[name] = Flat(module[name].storage.dtype, module[name].shape, ((models[0], module[name]),))
    for alias, name in dict(head.get("shared_params") or {}).items():
        if name in found:
            found[str(alias)] = found[name]
    return found


def _folder(source: Path) -> Path:
    """The checkpoint in a run's folder: the one that the file `latest` names, else the folder itself."""
    latest = source / "latest"
    if not latest.is_file():
        return source
    tag = latest.read_text(encoding="utf-8", errors="replace").strip()
    if Path(tag).name != tag or tag == ".." or not (source / tag).is_dir():
        raise CheckpointError(f"{latest} names {tag[:100]!r}, which is no folder beside it")
    return source / tag


def _ranks(folder: Path, pattern: re.Pattern[str]) -> list[Archive]:
    """The files of all data-parallel ranks, in order."""
    found = {file: one for file in sorted(folder.iterdir()) if (one := pattern.fullmatch(file.name))}
    if any(int(one[2]) for one in found.values()):
        raise CheckpointError(
            f"{folder} is of a run with tensor parallelism (mp_rank above 0), which is not put together; save a full state dict"
        )
    if not found:
        raise CheckpointError(f"{folder} lacks its model_states.pt files; copy them too")
    return [
        Archive(file, records=ZERO_RECORDS)
        for file in sorted(found, key=lambda file: int(found[file][1] or 0))
    ]


def _cut_by_group(
    archives: Sequence[Archive], states: Sequence[Mapping[str, Any]], shapes: Sequence[Mapping[str, Any]]
) -> dict[str, Flat]:
    """Stages 1 and 2: parameters lie one after another in the row that all ranks' parts make up."""
    flats = [
        _list(state.get("single_partition_of_fp32_groups"), one.path) for state, one in zip(states, archives)
    ]
    gaps = states[0].get("param_alignment_paddings")
    found = {}
    for group, named in enumerate(shapes):
        row = [(archive, rank[group]) for archive, rank in zip(archives, flats) if group < len(rank)]
        at = 0
        for number, (name, shape) in enumerate(named.items()):
            size = math.prod(shape)
            found[name] = _float(name, tuple(shape), _slice(row, at, size, name))
            at += size + (gaps[group][number] if gaps else 0)
    return found


def _cut_by_tensor(
    archives: Sequence[Archive], states: Sequence[Mapping[str, Any]], shapes: Mapping[str, Any]
) -> dict[str, Flat]:
    """Stage 3: every rank has an equal part of each parameter, the last ones padded."""
    rows = [
        [(archive, flat) for flat in _list(state.get("fp32_flat_groups"), archive.path)]
        for state, archive in zip(states, archives)
    ]
    found, at = {}, 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        part = -(-size // len(rows))
        held = [min(part, max(0, size - rank * part)) for rank in range(len(rows))]
        parts = [one for row, count in zip(rows, held) for one in _slice(row, at, count, name)]
        found[name] = _float(name, tuple(shape), parts)
        at += part
    return found


def _frozen(models: Sequence[Archive]) -> dict[str, Flat]:
    """Parameters that were not trained: whole in the first file, or (several files) a part in each."""
    shapes = models[0].value.get("frozen_param_shapes") or {}
    found = {}
    for name, shape in shapes.items():
        pieces = [(one, (one.value.get("frozen_param_fragments") or {}).get(name)) for one in models]
        if any(not isinstance(piece, Strided) for _, piece in pieces):
            raise CorruptCheckpoint(f"{models[0].path.parent} lacks a part of the frozen parameter {name}")
        row = [(one, _flat(piece)) for one, piece in pieces if isinstance(piece, Strided)]
        parts = _slice(row, 0, math.prod(shape), name)
        found[name] = Flat(row[0][1].storage.dtype, tuple(shape), tuple(parts))
    return found


def _slice(row: Sequence[Part], start: int, size: int, name: str) -> list[Part]:
    """Elements start.. of flat tensors one after another. Raises `CorruptCheckpoint` if they end before."""
    found, begin = [], 0
    for archive, flat in row:
        if not isinstance(flat, Strided) or len(flat.shape) != 1 or flat.stride != (1,):
            raise CorruptCheckpoint(f"{archive.path} holds something else than flat parameters")
        low, high = max(start, begin), min(start + size, begin + flat.shape[0])
        if low < high:
            found.append((archive, replace(flat, offset=flat.offset + low - begin, shape=(high - low,))))
        begin += flat.shape[0]
    if sum(part.shape[0] for _, part in found) != size:
        raise CorruptCheckpoint(
            f"{row[0][0].path.parent if row else 'the folder'} ends within {name}; files of ranks are cut or missing"
        )
    return found


def _float(name: str, shape: tuple[int, ...], parts: Sequence[Part]) -> Flat:
    kinds = {part.storage.dtype for _, part in parts} or {"F32"}
    if len(kinds) != 1:
        raise CorruptCheckpoint(f"the parts of {name} have different dtypes: {', '.join(sorted(kinds))}")
    return Flat(kinds.pop(), shape, tuple(parts))


def _flat(one: Strided) -> Strided:
    """A contiguous tensor without its shape."""
    return replace(one, shape=(math.prod(one.shape),), stride=(1,))


def _of(value: Any, key: str, path: Path) -> Mapping[str, Any]:
    found = value.get(key) if isinstance(value, Mapping) else None
    if not isinstance(found, Mapping):
        raise CorruptCheckpoint(f"{path} has no {key}; it is not a file of ZeRO")
    return found


def _list(value: Any, path: Path) -> list[Any]:
    if not isinstance(value, list):
        raise CorruptCheckpoint(f"{path} does not list its flat parameters; it is of another version of ZeRO")
    return value


def _number(value: Any) -> Any:
    """An enumeration's value."""
    return value.given[0] if isinstance(value, Record) and value.given else value
