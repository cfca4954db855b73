"""Whether the members of a shard make up samples we can train on, and what kinds of samples they are.

Invariant: a shard that passes holds nothing but whole samples: one image each, of a kind and size that is safe to decode, with
its end where it should be, and the label or caption its dataset needs. Whether labels have a class is for who knows the classes.
"""

import hashlib
import io
import re
import warnings
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from workers.data.pictures import kinds_of
from workers.data.tarscan import IMAGE_SUFFIXES, Member, ShardError, members

REVISION = 2
"""Raise it when `inspect` finds more than it did: shards that were found whole are then inspected again."""
MAX_PIXELS = 50_000_000
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
NEEDED_SUFFIX = {"classification": "cls", "retrieval": "txt"}
_BROKEN = (OSError, ValueError, SyntaxError)
"""What Pillow raises for a picture that it cannot read."""
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_END_OF_IMAGE, _START_OF_SCAN = b"\xff\xd9", b"\xff\xda"


@dataclass(frozen=True)
class Survey:
    """What the samples of a shard, or of a split, are.

    `labels` counts samples by label, in order of the labels; `top` is the key of a sample with the highest. `pictures` counts those of each kind
    of `pictures.KINDS`. `files` names the content of every picture, where captions belong to pictures (retrieval).
    """

    samples: int = 0
    labels: tuple[tuple[int, int], ...] = ()
    top: str = ""
    pictures: tuple[tuple[str, int], ...] = ()
    files: tuple[str, ...] = ()


def together(surveys: Iterable[Survey]) -> Survey:
    """One survey of several shards."""
    parts = list(surveys)
    labels, pictures = Counter[int](), Counter[str]()
    for part in parts:
        labels.update(dict(part.labels))
        pictures.update(dict(part.pictures))
    highest = max(labels, default=-1)
    return Survey(
        sum(part.samples for part in parts),
        tuple(sorted(labels.items())),
        next((part.top for part in parts if part.labels and part.labels[-1][0] == highest), ""),
        tuple(sorted(pictures.items())),
        tuple(file for part in parts for file in part.files),
    )


def inspect(shard: Path, kind: str, decode: bool = False) -> Survey:
    """Read a shard's headers, labels and captions, and of its images the headers, the ends and the checksums; with `decode` every pixel.

    Raises ShardError as `tarscan.members` does, and: unreadable (a sample without exactly one image, without the label or
    caption that `kind` needs, a label that is no number, an image that is broken or cut), pixels (an image beyond
    MAX_PIXELS, before decoding it).
    """
    seen: set[str] = set()
    labels, pictures = Counter[int](), Counter[str]()
    files: list[str] = []
    top = ""
    with shard.open("rb") as stream:
        for sample in _samples(shard):
            key = sample[0].key
            if key in seen:
                raise ShardError(shard, "duplicate", f"sample {key!r} appears twice")
            seen.add(key)
            held = _members(sample, stream, shard, kind)
            (name, data), *_ = ((name, held[name]) for name in IMAGE_SUFFIXES if name in held)
            pictures.update(_picture(data, shard, f"{key}.{name}", decode))
            captions = captions_of(held.get("txt", b""), shard, key)
            if kind == "retrieval":
                files.append(picture_id(data))
                _need_caption(captions, shard, key)
            else:
                label = label_of(held["cls"], shard, key)
                top = key if label > max(labels, default=-1) else top
                labels[label] += 1
    return Survey(
        len(seen), tuple(sorted(labels.items())), top, tuple(sorted(pictures.items())), tuple(files)
    )


def open_image(data: bytes, shard: Path, name: str) -> Image.Image:
    """An image whose header is read and whose pixels are not yet. Raises ShardError: unreadable or pixels."""
    stream: BinaryIO = io.BytesIO(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(stream, formats=IMAGE_FORMATS)
    except Image.DecompressionBombError:
        raise ShardError(shard, "pixels", f"image {name!r} claims a size no photograph has") from None
    except _BROKEN as error:
        raise ShardError(shard, "unreadable", f"image {name!r} cannot be opened ({error})") from None
    if image.width * image.height > MAX_PIXELS:
        raise ShardError(
            shard, "pixels", f"image {name!r} is {image.width}x{image.height}; at most {MAX_PIXELS} pixels"
        )
    return image


def label_of(data: bytes, shard: Path, key: str) -> int:
    """The class number in a .cls member. Raises ShardError for anything but digits."""
    label = _text(data, shard, key).strip()
    if not (label.isascii() and label.isdigit() and len(label) <= 9):
        raise ShardError(
            shard, "unreadable", f"sample {key!r} has the class {label[:20]!r}, which is no number",
            "Write the class's line number in classnames.txt, from 0.",
        )  # fmt: skip
    return int(label)


def check_label(label: int, classes: int, shard: Path, key: str) -> None:
    """Raise ShardError unless there are more `classes` than the label."""
    if label >= classes:
        raise ShardError(
            shard, "unreadable", f"sample {key!r} has the class '{label}'; classnames.txt holds {classes}",
            f"Labels are line numbers from 0: name the missing classes, or write labels below {classes}.",
        )  # fmt: skip


def captions_of(data: bytes, shard: Path, key: str) -> list[str]:
    """The captions in a .txt member, one a line. Raises ShardError for what is not UTF-8."""
    return [line.strip() for line in _text(data, shard, key).split("\n") if line.strip()]


def picture_id(data: bytes) -> str:
    """Names the content of a picture's file, so that samples of the same picture are known."""
    return hashlib.sha256(data).hexdigest()[:32]


def repeated(pictures: Sequence[Hashable]) -> int:
    """How many samples show a picture that another sample shows as well."""
    return sum(count for count in Counter(pictures).values() if count > 1)


def is_by_caption(pictures: Sequence[Hashable]) -> bool:
    """Whether a retrieval split has a sample for each caption of a picture, and not one for each picture.

    It has if most of its samples share their picture. Fewer are copies that came in by chance: each stays a picture.
    """
    return 2 * repeated(pictures) > len(pictures)


def _members(sample: list[Member], stream: BinaryIO, shard: Path, kind: str) -> dict[str, bytes]:
    """The bytes of a sample's image and texts by suffix."""
    key = sample[0].key
    images = [member for member in sample if member.suffix in IMAGE_SUFFIXES]
    if len(images) != 1:
        raise ShardError(shard, "unreadable", f"sample {key!r} has {len(images)} images, expected one")
    if all(member.suffix != NEEDED_SUFFIX[kind] for member in sample):
        raise ShardError(shard, "unreadable", f"sample {key!r} has no .{NEEDED_SUFFIX[kind]} member ({kind})")
    held = {}
    for member in sample:
        if member.suffix != "json":
            stream.seek(member.offset)
            held[member.suffix] = stream.read(member.size)
    return held


def _need_caption(captions: list[str], shard: Path, key: str) -> None:
    if not captions:
        raise ShardError(shard, "unreadable", f"sample {key!r} has no caption")


def _picture(data: bytes, shard: Path, name: str, decode: bool) -> list[str]:
    """The kinds of a picture that is whole."""
    image = open_image(data, shard, name)
    try:
        kinds = kinds_of(image)
        if decode or not _ends(data, image):
            open_image(data, shard, name).load()
    except _BROKEN as error:
        raise ShardError(shard, "unreadable", f"image {name!r} cannot be decoded ({error})") from None
    return kinds


def _ends(data: bytes, image: Image.Image) -> bool:
    """Whether an image of that data ends where its format says; if not, only decoding tells whether it is whole."""
    if image.format == "PNG":
        try:
            Image.open(
                io.BytesIO(data), formats=("PNG",)
            ).verify()  # the checksum of every chunk, up to the last
        except _BROKEN:
            return False
        return True
    if image.format == "WEBP":
        return len(data) >= int.from_bytes(data[4:8], "little") + 8
    return _jpeg_ends(data)


def _jpeg_ends(data: bytes) -> bool:
    """Whether the mark of the end comes after a scan: the one of a preview picture, inside a segment, is passed over."""
    at, scanned = 2, False
    while found := _JPEG_MARKER.search(data, at):
        marker, at = found[0], found.end()
        if marker == _END_OF_IMAGE:
            return scanned
        scanned = scanned or marker == _START_OF_SCAN
        at += int.from_bytes(data[at : at + 2], "big")
    return False


def _text(data: bytes, shard: Path, key: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise ShardError(shard, "unreadable", f"sample {key!r} holds text that is not UTF-8") from None


def _samples(shard: Path) -> Iterator[list[Member]]:
    """Members grouped by consecutive equal keys, as webdataset groups them."""
    group: list[Member] = []
    for member in members(shard):
        if group and group[0].key != member.key:
            yield group
            group = []
        group.append(member)
    if group:
        yield group
