"""The header of a safetensors file, validated before any of it is used.

A checkpoint may come from anywhere: truncated by a full disk, corrupted, or built to do harm. No memory is allocated by a length
that the file only claims.

Format: 8 bytes little-endian header length, JSON header, data. <https://github.com/huggingface/safetensors>

Invariant: every byte of the data belongs to exactly one tensor.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_service.checkpoints.dtypes import DTYPES, QUANTISED, DType
from merge_service.errors import CheckpointError, CorruptCheckpoint, QuantisedCheckpoint

HEADER_LIMIT = 100_000_000
"""Bytes of a header or an index: the limit of safetensors itself. A CLIP header has 40 KB, an index of 45,000 tensors 9 MB."""
MAX_VALUES = 2_000_000
"""Most JSON values in a header or an index; a tensor has ten or fewer. They cost about 100 bytes each, whatever the text claims."""
MAX_RANK = 64
MAX_NUMBER = 2**63
MAX_NAME = 300
SHOWN = 400
"""Most characters of an explanation, which may quote a long header."""


@dataclass(frozen=True)
class TensorInfo:
    """The place of a tensor in its file. `offset` counts bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    shard: int = 0

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def kind(self) -> DType:
        """The dtype as an object."""
        return DTYPES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.numel * self.kind.itemsize


def read_header(path: Path, shard: int = 0) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors in header order, and the metadata. Raises `CorruptCheckpoint` naming the file and what is wrong with it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise corrupt(
                path,
                f"the file has {size} bytes but its header claims {length}; it is cut or not safetensors",
            )
        if length > HEADER_LIMIT:
            raise corrupt(path, f"its header of {length} bytes is above the limit of {HEADER_LIMIT}")
        if file.peek(1)[:1] != b"{":
            raise corrupt(path, "its header is not a JSON object; it is not safetensors")
        text = file.read(length)
    header = parse_json(text, path)
    metadata = _metadata(header.pop("__metadata__", None), path)
    start = 8 + length
    tensors = {name: _tensor(name, entry, start, shard, path) for name, entry in header.items()}
    _check_coverage(tensors, start, size, path)
    return tensors, metadata


def build_header(
    layout: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]
) -> tuple[bytes, dict[str, TensorInfo]]:
    """The first bytes of a file that holds `layout` (name -> dtype, shape), and the place of each tensor.

    The header keeps the order of `layout`; the data puts wide types first, so that every tensor is aligned. Raises
    `CheckpointError` for a header that is too long for `read_header`.
    """
    begin, cursor = {}, 0
    infos = {name: TensorInfo(dtype, tuple(shape), 0) for name, (dtype, shape) in layout.items()}
    for name in sorted(infos, key=lambda n: -infos[n].kind.itemsize):
        begin[name] = cursor
        cursor += infos[name].nbytes
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    for name, info in infos.items():
        offsets = [begin[name], begin[name] + info.nbytes]
        entries[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    check_readable(text, f"{len(layout)} tensors and their metadata")
    start = 8 + len(text)
    placed = {name: TensorInfo(i.dtype, i.shape, start + begin[name]) for name, i in infos.items()}
    return len(text).to_bytes(8, "little") + text, placed


def check_readable(text: bytes, what: str) -> None:
    """Raise `CheckpointError` naming `what` if a header or an index would be refused by the code that reads it."""
    if len(text) > HEADER_LIMIT or _has_too_many(text):
        raise CheckpointError(
            f"{what} need {len(text)} bytes of JSON with up to {_values(text)} values; at most {HEADER_LIMIT} bytes and "
            f"{MAX_VALUES} values are read"
        )


def parse_json(text: bytes, path: Path | os.PathLike[str]) -> dict[str, Any]:
    """A JSON object without repeated keys; raises `CorruptCheckpoint`.

    Parsed JSON can take 30 times the memory of its text. Every value follows a comma or a bracket, so these are counted first.
    """
    if _has_too_many(text):
        raise corrupt(path, f"its header may hold {_values(text)} values, above the limit of {MAX_VALUES}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise ValueError(f"{twice!r} appears twice")
        return found

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise corrupt(path, f"its header is not valid JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise corrupt(path, "its header is not a JSON object")
    return value


def _has_too_many(text: bytes) -> bool:
    return len(text) > MAX_VALUES and _values(text) > MAX_VALUES


def _values(text: bytes) -> int:
    """An upper bound on the number of values in a JSON text."""
    return sum(text.count(mark) for mark in (b",", b"[", b"{"))


def _metadata(value: Any, path: Path) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise corrupt(path, "its __metadata__ is not a map of strings")
    return value


def _tensor(name: str, entry: Any, start: int, shard: int, path: Path) -> TensorInfo:
    if len(name) > MAX_NAME or not name.isprintable():
        raise corrupt(
            path, f"the tensor name {name[:60]!r} is no printable text of at most {MAX_NAME} characters"
        )
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise corrupt(path, f"the entry of tensor {name!r} lacks dtype, shape or data_offsets") from None
    if isinstance(dtype, str) and dtype in QUANTISED:
        raise QuantisedCheckpoint(
            f"{path} holds {QUANTISED[dtype]} ({name!r} is {dtype}), which cannot be merged as numbers; "
            "convert it to float16, bfloat16 or float32 first"
        )
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise corrupt(path, f"tensor {name!r} has the unknown dtype {dtype!r}; known are {', '.join(DTYPES)}")
    numbers = [*shape, begin, end] if isinstance(shape, list) and len(shape) <= MAX_RANK else [-1]
    if not all(type(n) is int and 0 <= n < MAX_NUMBER for n in numbers):
        raise corrupt(path, f"tensor {name!r} has an impossible shape or offset")
    info = TensorInfo(dtype, tuple(shape), start + begin, shard)
    if end - begin != info.nbytes:
        raise corrupt(path, f"tensor {name!r} of {info.nbytes} bytes is given {end - begin}")
    return info


def _check_coverage(tensors: dict[str, TensorInfo], start: int, size: int, path: Path) -> None:
    cursor = start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != cursor:
            raise corrupt(path, f"tensor {name!r} overlaps another or leaves a gap before it")
        cursor += info.nbytes
    if cursor > size:
        raise corrupt(path, f"the file is cut: it has {size} bytes, its tensors need {cursor}")
    if cursor < size:
        raise corrupt(path, f"{size - cursor} bytes follow the last tensor")


def corrupt(path: Path | os.PathLike[str], why: str) -> CorruptCheckpoint:
    """The error for an unusable file; a long explanation is cut."""
    shown = why if len(why) <= SHOWN else f"{why[:SHOWN]}..."
    return CorruptCheckpoint(f"{path} is not a usable checkpoint: {shown}")
