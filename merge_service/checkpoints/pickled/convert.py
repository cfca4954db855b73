"""Writes pickled checkpoints (.pt, .pth, .bin, .ckpt, and shards with an index) as safetensors.

The state dict is often an entry of what was saved. Names may have a prefix that a wrapper put before all of them. Tensors that share
memory are one tensor with several names: the file holds it once, and its metadata says which names stand for it.

Invariant: numbers and dtypes are those of the pickle, to the bit, and the source is not changed.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from merge_service.checkpoints.folders.companions import Folder
from merge_service.checkpoints.folders.kinds import ADAPTER, ADAPTER_CONFIG
from merge_service.checkpoints.header import TensorInfo
from merge_service.checkpoints.pickled.archive import Archive
from merge_service.checkpoints.pickled.distributed import Assembled, distributed, is_distributed
from merge_service.checkpoints.pickled.machine import Strided
from merge_service.checkpoints.pickled.zero import Flat, is_zero, zero
from merge_service.checkpoints.target import Target
from merge_service.checkpoints.ties import of_groups
from merge_service.errors import CheckpointError
from merge_service.files.absent import absence

Held = TypeVar("Held")
_KEYS = (
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "net",
    "weights",
    "params",
    "ema",
    "ema_state_dict",
    "model_ema",
    "params_ema",
)
_WRAPPERS = ("module.", "_orig_mod.", "_forward_module.")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".bin.index.json")
_SAFE = (".safetensors", ".safetensors.index.json")
_NAMES = ("pytorch_model", "open_clip_pytorch_model", "diffusion_pytorch_model")


@dataclass(frozen=True)
class Converted:
    """What was written: `tensors` and `ties` (alias to name), and what the user should know."""

    out: Path
    tensors: int
    ties: Mapping[str, str]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Found:
    """A tensor and the archive it is in."""

    archive: Archive
    tensor: Strided

    @property
    def place(self) -> tuple[Any, ...]:
        """Equal for two names of one tensor."""
        one = self.tensor
        return str(self.archive.path), one.storage.key, one.offset, one.shape, one.stride, one.storage.dtype


@dataclass(frozen=True)
class _Laid:
    tensors: Mapping[str, TensorInfo]


def convert(
    source: Path,
    out: Path,
    key: str | None = None,
    strip_prefix: str | None = None,
    shard_bytes: int | None = None,
) -> Converted:
    """Convert a pickled file, an index of such files, a directory with either, or that of a distributed checkpoint of torch or
    of DeepSpeed's ZeRO, to a .safetensors file or a directory.

    `key` is the path (a.b) of the state dict in what was saved, if it is not found. `strip_prefix` is removed from names. Raises
    `CheckpointError` for what is no tensor, naming it, or if there is no state dict, or more than one.
    """
    notes: list[str] = []
    if is_distributed(source) or is_zero(source):
        return _consolidate(source, out, (key, strip_prefix), shard_bytes, notes)
    held: dict[str, _Found] = {}
    for file in _files(source):
        archive = Archive(file)
        found = _state_dict(archive, key, notes)
        twice = held.keys() & found.keys()
        if twice:
            raise CheckpointError(f"{file} holds {min(twice)}, which another of its shards has as well")
        held |= found
    held = _renamed(source, held, strip_prefix, notes)
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, one in held.items():
        if one.tensor.shape:
            groups.setdefault(one.place, []).append(name)
    ties = of_groups(groups.values())
    layout = {
        name: TensorInfo(one.tensor.storage.dtype, one.tensor.shape, 0)
        for name, one in held.items()
        if name not in ties
    }
    target = _adapter(source, out) or Target.of(out, [source], shard_bytes)
    with target.open(_Laid(layout), {"format": "pt", **ties}) as writer:
        for name in layout:
            writer.write_stored(name, 0, held[name].archive.stored(held[name].tensor))
    if ties:
        notes.append(
            f"written once, for two names: {', '.join(f'{alias} is {name}' for alias, name in list(ties.items())[:3])}"
        )
    return Converted(target.place(_Laid(layout)), len(layout), ties, (*notes, *target.notes))


def _adapter(source: Path, out: Path) -> Target | None:
    """The folder that an adapter is written to, with its configuration; None for models, and for a single file."""
    config = (source if source.is_dir() else source.parent) / ADAPTER_CONFIG
    if out.name.endswith(".safetensors") or not config.is_file() or ADAPTER not in _files(source)[0].name:
        return None
    return Target(out, out / f"{ADAPTER}.safetensors", Folder(ADAPTER, {ADAPTER_CONFIG: config}))


def _consolidate(
    source: Path, out: Path, names: tuple[str | None, str | None], shard_bytes: int | None, notes: list[str]
) -> Converted:
    """Put the tensors of a distributed checkpoint together, each piece by piece. `names` are the key and the prefix to strip."""
    key, prefix = names
    found: Mapping[str, Assembled | Flat] = (
        distributed(source, key, notes) if is_distributed(source) else zero(source, notes)
    )
    held = _renamed(source, dict(found), prefix, notes)
    groups: dict[int, list[str]] = {}
    for name, one in held.items():
        groups.setdefault(id(one), []).append(name)
    ties = of_groups(groups.values())
    laid = _Laid(
        {name: TensorInfo(one.dtype, one.shape, 0) for name, one in held.items() if name not in ties}
    )
    target = Target.of(out, [source], shard_bytes)
    with target.open(laid, {"format": "pt", **ties}) as writer:
        for name in laid.tensors:
            for start, stored in held[name].spans():
                writer.write_stored(name, start, stored)
    return Converted(target.place(laid), len(laid.tensors), ties, (*notes, *target.notes))


def _files(source: Path) -> list[Path]:
    """The pickles behind a path: itself, the shards of an index, or those of a directory under a usual name."""
    names = [one.name for one in source.iterdir()] if source.is_dir() else [source.name]
    if any(name.endswith(_SAFE) for name in names) and not any(name.endswith(_PICKLED) for name in names):
        raise CheckpointError(f"{source} is safetensors already; it needs no conversion")
    if source.is_dir():
        found = [
            source / f"{name}{suffix}"
            for name in _NAMES
            for suffix in (".bin.index.json", ".bin")
            if (source / f"{name}{suffix}").is_file()
        ]
        found = found or [one for one in [source / f"{ADAPTER}.bin"] if one.is_file()]
        found = found or sorted(
            one for one in source.iterdir() if one.suffix in (".pt", ".pth", ".ckpt") and one.is_file()
        )
        if len(found) != 1:
            what = ", ".join(one.name for one in found[:5]) or "none"
            raise CheckpointError(
                f"{source} should hold one pickled checkpoint ({', '.join(_NAMES)}.bin); it holds {what}: name the file"
            )
        return _files(found[0])
    if not source.is_file():
        raise CheckpointError(f"{source} {absence(source)}")
    if not source.name.endswith(".index.json"):
        return [source]
    try:
        names = sorted(set(json.loads(source.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise CheckpointError(f"{source} is no index of shards: it has no weight_map") from None
    wrong = next((name for name in names if not isinstance(name, str) or Path(name).name != name), None)
    if wrong is not None:
        raise CheckpointError(f"{source} points outside its own directory: {str(wrong)[:100]!r}")
    return [source.parent / name for name in names]


def _state_dict(archive: Archive, key: str | None, notes: list[str]) -> dict[str, _Found]:
    """The tensors of the one state dict in an archive."""
    path, value = archive.path, archive.value
    for part in key.split(".") if key else ():
        if not isinstance(value, Mapping) or part not in value:
            raise CheckpointError(f"{path} has no entry {key!r}; it has {_entries(archive.value)}")
        value = value[part]
    if not isinstance(value, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(value).__name__}, not a state dict; name its entry with --key"
        )
    if not any(isinstance(one, Strided) for one in value.values()) and key is None:
        inside = [
            name for name in _KEYS if isinstance(value.get(name), Mapping) and _has_tensors(value[name])
        ]
        if len(inside) != 1:
            why = f"several ({', '.join(inside)})" if inside else "none under a usual name"
            raise CheckpointError(
                f"{path} holds {why} of the state dicts that it might be; choose with --key among {_entries(value)}"
            )
        left = [str(name) for name in value if name != inside[0]]
        notes.append(
            f"taken from {path.name}: {inside[0]}" + (f"; left: {', '.join(left[:5])}" if left else "")
        )
        value = value[inside[0]]
    return dict(_tensors(archive, value, notes))


def _tensors(archive: Archive, value: Mapping[Any, Any], notes: list[str]) -> Iterator[tuple[str, _Found]]:
    left = []
    for name, one in value.items():
        if isinstance(one, Strided) and isinstance(name, str):
            yield name, _Found(archive, one)
        else:
            left.append(str(name))
    if len(left) == len(value):
        raise CheckpointError(
            f"{archive.path} has no tensors by name there; choose with --key among {_entries(archive.value)}"
        )
    if left:
        notes.append(f"left out of {archive.path.name}, as they are no tensors: {', '.join(left[:5])}")


def _renamed(source: Path, held: dict[str, Held], prefix: str | None, notes: list[str]) -> dict[str, Held]:
    """Without the prefix, or without those that wrappers put before all names."""
    if prefix is not None:
        if not any(name.startswith(prefix) for name in held):
            raise CheckpointError(
                f"{source}: no name begins with the prefix {prefix!r}; the first is {next(iter(held))!r}"
            )
        return _without(source, held, prefix)
    for wrapper in _WRAPPERS:
        if all(name.startswith(wrapper) for name in held):
            notes.append(f"read without the prefix {wrapper} that all names have")
            held = _without(source, held, wrapper)
    return held


def _without(source: Path, held: dict[str, Held], prefix: str) -> dict[str, Held]:
    found = {name.removeprefix(prefix): one for name, one in held.items()}
    if len(found) != len(held):
        raise CheckpointError(f"{source} holds a name with the prefix {prefix!r} and without it")
    return found


def _has_tensors(value: Mapping[Any, Any]) -> bool:
    return any(isinstance(one, Strided) for one in value.values())


def _entries(value: Any) -> str:
    names: Sequence[str] = [str(name) for name in value] if isinstance(value, Mapping) else []
    return ", ".join(names[:8]) or "none"
