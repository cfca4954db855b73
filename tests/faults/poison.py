"""Hostile shards: 64 of them, each a good shard with one defect that must be refused, and the expected reason."""

import gzip
import io
import pickle
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from workers.data.writer import encode_png

BLOCK = 512
CANARY = "canary"
"""The file that code in a shard would create, where the test looks for it."""
IMAGE = encode_png(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))

Poison = tuple[str, bytes]
"""The reason of the ShardError, and the shard."""


class Trap:
    """An object that creates the canary when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return exec, (f"open({CANARY!r}, 'w').close()",)


def trap(suffix: str) -> bytes:
    """The content with which a decoder for this suffix would run code."""
    code = pickle.dumps(Trap())
    if suffix.endswith("gz"):
        return gzip.compress(code, mtime=0)
    if suffix == "npy":
        stream = io.BytesIO()
        np.lib.format.write_array_header_1_0(stream, {"descr": "|O", "fortran_order": False, "shape": (1,)})
        return stream.getvalue() + code
    return f"open({CANARY!r}, 'w').close()".encode() if suffix == "py" else code


def member(title: str, data: bytes = b"", kind: bytes = b"0", **fields: bytes) -> bytes:
    """One tar member with a right checksum, whatever else is wrong; `fields` overwrite name, size, magic or link."""
    places = {
        "name": (0, 100),
        "size": (124, 12),
        "link": (157, 100),
        "magic": (257, 8),
        "prefix": (345, 155),
    }
    head = bytearray(BLOCK)
    values = {"name": title.encode()[:100], "size": b"%011o\0" % len(data), "magic": b"ustar\x0000", **fields}
    head[100:124] = b"0000644\0" + b"0000000\0" * 2
    head[136:148] = b"00000000000\0"
    head[156:157] = kind
    for field, value in values.items():
        start, length = places[field]
        head[start : start + length] = value[:length].ljust(length, b"\0")
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head) + data + bytes(-len(data) % BLOCK)


def pax(records: dict[str, bytes], kind: bytes = b"x") -> bytes:
    body = b""
    for key, value in records.items():
        line = b" " + key.encode() + b"=" + value + b"\n"
        length = len(line) + len(str(len(line) + 3))
        length = len(line) + len(str(length))
        body += str(length).encode() + line
    return member("././@PaxHeader", body, kind)


def long_name(name: bytes) -> bytes:
    return member("././@LongLink", name + b"\0", b"L")


def sample(key: str, image: bytes = IMAGE, label: bytes = b"1") -> bytes:
    return member(f"{key}.png", image) + member(f"{key}.cls", label)


def shard(*parts: bytes) -> bytes:
    return sample("s0") + sample("s1") + b"".join(parts) + bytes(2 * BLOCK)


CODE = (
    "pyd",
    "pkl",
    "pickle",
    "pth",
    "pt",
    "pyd.gz",
    "pkl.gz",
    "npy",
    "npz",
    "ten",
    "py",
    "so",
    "PKL",
    "png.pkl",
)
NAMES = {
    "above": b"../../x.png", "within and above": b"a/../../x.png", "absolute": b"/abs.png", "dots": b"./../x.png",
    "hidden": b".png", "of a folder": b"..", "no suffix": b"plain", "empty": b"", "backslashes": b"..\\x.png", "two suffixes": b"a.b.png",
}  # fmt: skip
KINDS = {
    "symbolic link": b"2", "hard link": b"1", "character device": b"3", "block device": b"4", "pipe": b"6", "contiguous": b"7",
    "sparse": b"S", "volume label": b"V", "folder dump": b"D", "continued": b"M", "solaris header": b"X", "unknown": b"Z",
}  # fmt: skip


def poisons() -> dict[str, Poison]:
    """All 64 shards by their defect."""
    found = {
        f"code in a .{suffix}": ("forbidden", shard(member(f"a.{suffix}", trap(suffix)))) for suffix in CODE
    }
    found |= {
        f"name: {what}": ("forbidden", shard(member("", IMAGE, name=name))) for what, name in NAMES.items()
    }
    link = f"/etc/{CANARY}".encode()
    found |= {
        f"type: {what}": ("forbidden", shard(member("x.png", b"", kind, link=link)))
        for what, kind in KINDS.items()
    }
    return found | dict(_headers()) | dict(_samples()) | dict(_files())


def _headers() -> Iterator[tuple[str, Poison]]:
    last = member("x.png", IMAGE)
    yield "name of 10,000 characters, GNU", ("forbidden", shard(long_name(b"n" * 10_000 + b".png"), last))
    yield "name of 10,000 characters, pax", ("forbidden", shard(pax({"path": b"n" * 10_000 + b".png"}), last))
    yield "name with NUL", ("forbidden", shard(pax({"path": b"a\0b.png"}), last))
    yield "path above, GNU", ("forbidden", shard(long_name(b"../../x.png"), last))
    yield "path above, pax", ("forbidden", shard(pax({"path": b"../../x.png"}), last))
    yield "path above, prefix", ("forbidden", shard(member("x.png", IMAGE, prefix=b"../..")))
    yield "name for all members", ("forbidden", pax({"path": b"x.pkl"}, b"g") + shard())
    yield "size for all members", ("forbidden", pax({"size": b"1"}, b"g") + shard())
    yield "sparse, pax", ("forbidden", shard(pax({"GNU.sparse.major": b"1"}), last))
    yield "header of 2 MB", ("forbidden", shard(pax({"comment": b"x" * (2 << 20)}), last))
    yield "size beyond the file", ("cut", shard(member("x.png", b"", size=b"77777777777\0")))
    yield "size of 2^80", ("cut", shard(member("x.png", b"", size=b"\x80\0" + b"\xff" * 10)))
    yield "negative size", ("flipped", shard(member("x.png", b"", size=b"-0000001000\0")))
    yield "negative size, pax", ("flipped", shard(pax({"size": b"-512"}), last))
    yield "size of digits that are none", ("flipped", shard(pax({"size": "²".encode()}), last))
    yield "broken pax record", ("flipped", shard(member("././@PaxHeader", b"999 path=x\n", b"x"), last))


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    body = b"\x89PNG\r\n\x1a\n"
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"
    for kind, data in ((b"IHDR", head), *chunks, (b"IEND", b"")):
        body += len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
    return body


def _samples() -> Iterator[tuple[str, Poison]]:
    code, empty = pickle.dumps(Trap()), zlib.compress(b"")
    yield "sample twice", ("duplicate", shard(sample("s0")))
    yield "file twice", ("duplicate", shard(sample("s2"), member("s2.cls", b"0")))
    yield "code as an image", ("unreadable", shard(sample("s2", code)))
    yield "image of 50,000 x 50,000", ("pixels", shard(sample("s2", png(50_000, 50_000, (b"IDAT", empty)))))
    yield "image without pixels", ("unreadable", shard(sample("s2", png(8, 8, (b"IDAT", empty)))))
    yield (
        "text of 20 MB in an image",
        ("unreadable", shard(sample("s2", png(8, 8, (b"zTXt", b"a\0\0" + zlib.compress(bytes(20 << 20))))))),
    )
    yield (
        "PostScript as an image",
        ("unreadable", shard(sample("s2", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"))),
    )
    yield "code as a label", ("unreadable", shard(sample("s2", label=code)))
    yield "label that is a digit and no number", ("unreadable", shard(sample("s2", label="²".encode())))
    yield "label of 5,000 digits", ("unreadable", shard(sample("s2", label=b"9" * 5000)))


def _files() -> Iterator[tuple[str, Poison]]:
    whole = shard()
    yield "packed", ("cut", gzip.compress(whole, mtime=0))
    yield "packed 1,000 times", ("flipped", gzip.compress(bytes(64 << 20), 1, mtime=0) * 16)
