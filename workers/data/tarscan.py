"""Strict reader of tar headers, because lenient readers lose training data silently.

`tarfile`, and so webdataset, takes a damaged header for the end of the archive: a shard with one flipped byte yields fewer samples and
no error. This reader accepts only the content of a webdataset shard: regular files (directories are skipped) with a known
suffix, plain relative names, no duplicates, and a proper end-of-archive mark.
Invariant: either every member of the shard has been returned, or a `ShardError` states the problem and its place.
"""

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from merge_service.errors import UserError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
ALLOWED_SUFFIXES = (*IMAGE_SUFFIXES, "txt", "cls", "json")

BLOCK = 512
HARMLESS_GLOBALS = {"comment", "mtime", "atime", "ctime", "uid", "gid", "uname", "gname"}
"""The keys that a global header may state. Readers disagree on names and sizes there, so these are refused."""
MAX_NAME = 1000
MAX_MEMBER_BYTES = 64 << 20
MAX_TEXT_BYTES = 1 << 20
_KEY_AND_SUFFIX = re.compile(r"^((?:.*/|)[^./][^.]*)\.([^/]+)$")


class ShardError(UserError):
    """A shard that must not be trained on; `shard` is its path or its address.

    `reason` is one word for programs: missing, cut, flipped, short, forbidden, duplicate, pixels, unreadable.
    """

    def __init__(
        self, shard: Path | str, reason: str, detail: str, advice: str = "Fetch or write this shard again."
    ):
        super().__init__(shard, reason, detail, advice)  # all arguments, for pickle to rebuild the exception
        self.shard, self.reason = shard, reason

    def __str__(self) -> str:
        shard, reason, detail, advice = self.args
        return f"{shard}: {reason}: {detail}. {advice}"


@dataclass(frozen=True)
class Member:
    """One regular file of a shard; `offset` is the position of its data in the shard, `offset` and `size` are in bytes."""

    name: str
    key: str
    suffix: str
    offset: int
    size: int


def members(shard: Path) -> Iterator[Member]:
    """Every regular member of a shard, in order.

    Raises ShardError: cut (the file ends early), flipped (a header is damaged), forbidden (a suffix, name or member type that a shard
    must not hold), duplicate (a name twice).
    """
    seen: set[str] = set()
    with shard.open("rb") as stream:
        length = stream.seek(0, io.SEEK_END)
        stream.seek(0)
        for name, kind, offset, size in _headers(stream, shard, length):
            if kind == b"5":
                continue
            if kind not in (b"0", b"\0"):
                raise _forbidden(shard, name, f"is not a regular file (tar type {kind.decode('latin-1')!r})")
            member = _checked(shard, name, offset, size)
            if member.name in seen:
                raise ShardError(shard, "duplicate", f"member {name!r} appears twice")
            seen.add(member.name)
            yield member


def _forbidden(shard: Path, name: str, why: str) -> ShardError:
    shown = name if len(name) <= 80 else name[:77] + "..."
    return ShardError(shard, "forbidden", f"member {shown!r} {why}", "Write the shard without it.")


def _checked(shard: Path, name: str, offset: int, size: int) -> Member:
    if len(name) > MAX_NAME or "\0" in name or name.startswith("/") or ".." in name.split("/"):
        raise _forbidden(shard, name, "has a name that is not a plain relative path")
    match = _KEY_AND_SUFFIX.match(name.removeprefix("./"))
    if match is None:
        raise _forbidden(shard, name, "has no sample key and suffix (expected KEY.SUFFIX)")
    suffix = match.group(2).lower()
    if suffix not in ALLOWED_SUFFIXES:
        # webdataset splits a name at its first dot, so a split at the last dot would give another sample
        dotted = suffix.rpartition(".")[2] in ALLOWED_SUFFIXES
        why = (
            ", as a suffix begins at the first dot of a file's name: write names without other dots" * dotted
        )
        raise _forbidden(
            shard, name, f"has the suffix .{suffix}{why}; allowed: {', '.join(ALLOWED_SUFFIXES)}"
        )
    limit = MAX_MEMBER_BYTES if suffix in IMAGE_SUFFIXES else MAX_TEXT_BYTES
    if size > limit:
        raise _forbidden(shard, name, f"holds {size} bytes; the limit is {limit}")
    return Member(name, match.group(1), suffix, offset, size)


def _headers(stream: BinaryIO, shard: Path, length: int) -> Iterator[tuple[str, bytes, int, int]]:
    """(name, type, data offset, size) of every header, with pax and GNU long names applied to the header that follows them."""
    long_name, pax, position = "", {}, 0
    while True:
        stream.seek(position)
        header = stream.read(BLOCK)
        if len(header) < BLOCK:
            raise ShardError(shard, "cut", f"the file ends at byte {length} without the end-of-archive mark")
        if not any(header):
            _only_zeros_left(stream, shard)
            return
        name, kind, size = _parse(header, shard, position)
        if kind in (b"x", b"g", b"L", b"K"):
            body = _extension(stream, shard, position, size, length)
            if kind == b"L":
                long_name = body.rstrip(b"\0").decode("utf-8", "replace")
            elif kind in (b"x", b"g"):
                stated = _pax(body, shard, position)
                if kind == b"x":
                    pax = stated
                elif not stated.keys() <= HARMLESS_GLOBALS:
                    raise _forbidden(shard, ", ".join(stated), "is stated for all members at once")
        else:
            name = pax.get("path", long_name or name)
            size = _decimal(pax["size"], shard, position) if "size" in pax else size
            if any(key.startswith("GNU.sparse") for key in pax):
                raise _forbidden(shard, name, "is a sparse file")
            if position + BLOCK + size > length:
                raise ShardError(shard, "cut", f"the file ends at byte {length}, inside member {name!r}")
            yield name, kind, position + BLOCK, size
            long_name, pax = "", {}
        position += BLOCK + -(-size // BLOCK) * BLOCK


def _parse(header: bytes, shard: Path, position: int) -> tuple[str, bytes, int]:
    """Name, type and size (bytes) of one ustar or GNU header, after its checksum (POSIX.1-1988, unsigned) is checked."""
    broken = ShardError(shard, "flipped", f"the tar header at byte {position} is damaged")
    try:
        stated = int(header[148:156].split(b"\0")[0].strip() or b"x", 8)
    except ValueError:
        raise broken from None
    if stated != sum(header) - sum(header[148:156]) + 8 * 32:
        raise broken
    field = header[124:136]
    if field[0] == 0x80:
        size = int.from_bytes(field[1:], "big")
    else:
        try:
            size = int(field.split(b"\0")[0].strip() or b"0", 8)
        except ValueError:
            raise broken from None
    if size < 0:
        raise broken
    name = _text(header[:100])
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return (f"{prefix}/{name}" if prefix else name), header[156:157], size


def _text(field: bytes) -> str:
    return field.split(b"\0")[0].decode("utf-8", "replace")


def _extension(stream: BinaryIO, shard: Path, position: int, size: int, length: int) -> bytes:
    if position + BLOCK + size > length:
        raise ShardError(shard, "cut", f"the file ends at byte {length}, inside an extended header")
    if size > MAX_TEXT_BYTES:
        raise ShardError(
            shard,
            "forbidden",
            f"the extended header at byte {position} has {size} bytes; the limit is {MAX_TEXT_BYTES}",
        )
    return stream.read(size)


def _decimal(value: str, shard: Path, position: int) -> int:
    if not value.isascii() or not value.isdigit() or len(value) > 20:
        raise ShardError(
            shard, "flipped", f"the extended header before byte {position} states the size {value!r}"
        )
    return int(value)


def _pax(body: bytes, shard: Path, position: int) -> dict[str, str]:
    """Records `LENGTH KEY=VALUE\\n` of a pax extended header (POSIX.1-2001)."""
    records: dict[str, str] = {}
    while body:
        digits, _, _ = body.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) <= 7 else 0
        key, equals, value = body[len(digits) + 1 : length - 1].partition(b"=")
        if not equals or length > len(body) or body[length - 1 : length] != b"\n":
            raise ShardError(shard, "flipped", f"the extended header at byte {position} is malformed")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
        body = body[length:]
    return records


def _only_zeros_left(stream: BinaryIO, shard: Path) -> None:
    while chunk := stream.read(1 << 20):
        if chunk.count(0) != len(chunk):
            raise ShardError(shard, "flipped", "there is data after the end-of-archive mark")
