"""Weights written as the difference from a base, without loss, for checkpoints that are seldom read.

An expert lies near the base that it was trained from: equal signs and exponents, equal leading bits. The numbers of both are taken as
integers and subtracted; the bytes of equal rank stand together; each piece is compressed by itself, so that a part can be read alone.
Invariant: what is unpacked is the packed file to the byte, header included, whatever its tensors hold (NaN, -0, any dtype), and the
memory does not depend on its size.

Layout: `MAGIC`, 8 bytes little-endian length of a JSON table, the table, then the pieces one after another.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from merge_service.checkpoints.header import TensorInfo, parse_json, read_header
from merge_service.errors import CorruptCheckpoint
from merge_service.files.mapping import mapped

MAGIC = b"TMPACK1\n"
PIECE = 1 << 20
"""Bytes of a piece before compression."""
LEVEL = 3
_LIMIT = 1 << 28


@dataclass(frozen=True)
class Region:
    """Bytes `start` to `stop` of the file, numbers of `width` bytes; `base` is where the same tensor begins in the base, None if nowhere."""

    start: int
    stop: int
    width: int
    base: int | None


def pack(weights: Path, base: Path, out: Path) -> None:
    """Write the safetensors file `weights` to `out`, as its difference from the safetensors file `base`.

    Raises `CorruptCheckpoint` if one of them is not a whole safetensors file.
    """
    regions, data, before = _regions(weights, base), mapped(weights), mapped(base)
    digest, sizes = hashlib.sha256(), list[int]()
    body = out.with_name(f"{out.name}.body")
    try:
        with body.open("wb") as stream:
            for region, first, last in _pieces(regions):
                raw = data[first:last]
                digest.update(raw.tobytes())
                piece = _compressed(_planes(raw, _beside(before, region, first, last), region.width))
                sizes.append(len(piece))
                stream.write(piece)
        table = json.dumps(
            {
                "bytes": data.size,
                "sha256": digest.hexdigest(),
                "regions": [[one.start, one.stop, one.width, one.base] for one in regions],
                "sizes": sizes,
            }
        ).encode()
        with out.open("wb") as target, body.open("rb") as stream:
            target.write(MAGIC + len(table).to_bytes(8, "little") + table)
            while chunk := stream.read(PIECE):
                target.write(chunk)
    finally:
        body.unlink(missing_ok=True)


def unpack(packed: Path, base: Path, out: Path) -> str:
    """Write the file that was packed to `out`, and return its sha256.

    Raises `CorruptCheckpoint` if `packed` is cut or altered, or `base` is not the file it was packed against.
    """
    before, digest = mapped(base), hashlib.sha256()
    with packed.open("rb") as stream, out.open("wb") as target:
        table = _table(packed, stream)
        for (region, first, last), size in zip(table["pieces"], table["sizes"], strict=True):
            planes = _decompressed(packed, stream.read(size), last - first)
            raw = _numbers(planes, _beside(before, region, first, last), region.width)
            digest.update(raw)
            target.write(raw)
    if digest.hexdigest() != table["sha256"]:
        raise CorruptCheckpoint(
            f"{packed}: what it holds has not the sha256 that it states; it is damaged, or {base} is"
        )
    return digest.hexdigest()


def _regions(weights: Path, base: Path) -> list[Region]:
    """The whole file as regions in order: its header, then its tensors."""
    (tensors, _), (others, _) = read_header(weights), read_header(base)
    placed = sorted((info.offset, name) for name, info in tensors.items() if info.nbytes)
    size = weights.stat().st_size
    regions = [Region(0, placed[0][0] if placed else size, 1, None)]
    for start, name in placed:
        info = tensors[name]
        regions.append(Region(start, start + info.nbytes, info.kind.itemsize, _place(info, others.get(name))))
    return regions


def _place(info: TensorInfo, other: TensorInfo | None) -> int | None:
    same = other is not None and (other.dtype, other.shape) == (info.dtype, info.shape)
    return other.offset if same and other else None


def _pieces(regions: list[Region]) -> Iterator[tuple[Region, int, int]]:
    for region in regions:
        step = PIECE - PIECE % region.width
        for first in range(region.start, region.stop, step):
            yield region, first, min(first + step, region.stop)


def _beside(base: np.ndarray, region: Region, first: int, last: int) -> np.ndarray | None:
    """The bytes of the base for a piece."""
    if region.base is None:
        return None
    start = region.base + first - region.start
    return base[start : start + last - first]


def _planes(raw: np.ndarray, beside: np.ndarray | None, width: int) -> np.ndarray:
    """The bytes of a piece, those of equal rank together; numbers as differences, small ones of either sign as small integers."""
    if beside is None:
        return np.ascontiguousarray(raw.reshape(-1, width).T)
    unsigned, signed = np.dtype(f"<u{width}"), np.dtype(f"<i{width}")
    # a copy first: a tensor may lie at any byte of its file
    step = (raw.copy().view(unsigned) - beside.copy().view(unsigned)).view(signed)
    folded = (step << 1) ^ (step >> (8 * width - 1))
    return np.ascontiguousarray(folded.view(np.uint8).reshape(-1, width).T)


def _numbers(planes: np.ndarray, beside: np.ndarray | None, width: int) -> bytes:
    """The inverse of `_planes`."""
    flat = np.ascontiguousarray(planes.reshape(width, -1).T).reshape(-1)
    if beside is None:
        return flat.tobytes()
    unsigned = np.dtype(f"<u{width}")
    folded = flat.view(unsigned)
    step = (folded >> 1) ^ (0 - (folded & 1)).astype(unsigned)
    return (step + beside.copy().view(unsigned)).tobytes()


def _compressed(planes: np.ndarray) -> bytes:
    return bytes(_codec().compress(planes.tobytes(), asbytes=True))


def _decompressed(packed: Path, piece: bytes, size: int) -> np.ndarray:
    try:
        return np.frombuffer(_codec().decompress(piece, size, asbytes=True), np.uint8)
    except (OSError, ValueError) as error:
        raise CorruptCheckpoint(f"{packed} is cut or altered: {error}") from error


def _codec() -> Any:
    import pyarrow

    return pyarrow.Codec("zstd", LEVEL)


def _table(packed: Path, stream: BinaryIO) -> dict[str, Any]:
    """The table of a packed file, checked as far as reading relies on it."""
    head = stream.read(len(MAGIC) + 8)
    length = int.from_bytes(head[len(MAGIC) :], "little")
    if head[: len(MAGIC)] != MAGIC or length > min(_LIMIT, packed.stat().st_size):
        raise CorruptCheckpoint(f"{packed} is cut, or no packed checkpoint")
    table = parse_json(stream.read(length), packed)
    try:
        pieces, sizes = list(_pieces([Region(*one) for one in table["regions"]])), table["sizes"]
        whole = len(pieces) == len(sizes) and sum(sizes) + length + len(head) == packed.stat().st_size
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise CorruptCheckpoint(f"{packed} is cut or altered: {error!r}") from error
    if not whole:
        raise CorruptCheckpoint(f"{packed} is cut or altered")
    return {**table, "pieces": pieces}
