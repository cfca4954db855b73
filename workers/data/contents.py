"""Validation of a shard's samples: one safe image each, with the label or caption that the dataset needs.

Damaged or unsafe samples are found before training, by name, and the kinds of pictures are counted on the way.
Invariant: every sample of a shard that passes is complete: one image whose format and size are safe to decode and whose data does not
end early, and the label or caption of its kind. Whether a label has a class name is checked by the caller (`check_label`).
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

from workers.data.pictures import kinds_of, seen_size
from workers.data.tarscan import IMAGE_SUFFIXES, Member, ShardError, members

REVISION = 2
"""Increase it when `inspect` detects more; shards that passed earlier are then inspected again."""
MAX_PIXELS = 50_000_000
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
NEEDED_SUFFIX = {"classification": "cls", "retrieval": "txt"}
_TOGETHER = "Write this shard again, with the members of each sample next to each other."
_BROKEN = (OSError, ValueError, SyntaxError)
"""The exceptions that Pillow raises for a picture that it cannot read."""
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_END_OF_IMAGE, _START_OF_SCAN = b"\xff\xd9", b"\xff\xda"


@dataclass(frozen=True)
class Survey:
    """Counts over the samples of a shard or a split.

    `labels` are (label, samples) in the order of the labels; `top` is the key of a sample with the highest label. `pictures` are
    (kind of `pictures.KINDS`, samples). `files` are the `picture_id` of every sample of a retrieval set, otherwise empty.
    """

    samples: int = 0
    labels: tuple[tuple[int, int], ...] = ()
    top: str = ""
    pictures: tuple[tuple[str, int], ...] = ()
    files: tuple[str, ...] = ()


def together(surveys: Iterable[Survey]) -> Survey:
    """The sum of the surveys of several shards."""
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


@dataclass(frozen=True)
class Whole:
    """A complete sample. `text` is the member with its captions; `label` is -1 if the dataset has no classes.

    `data` is the encoded picture, `size` its displayed height and width in pixels, `kinds` its `pictures.KINDS`. `plain` is whether
    it is a JPEG that every JPEG decoder displays alike.
    """

    picture: Member
    text: Member | None
    label: int
    data: bytes
    size: tuple[int, int]
    kinds: tuple[str, ...]
    plain: bool


def samples_in(shard: Path, kind: str, decode: bool = False) -> Iterator[Whole]:
    """The validated samples of a shard, in order.

    Labels and captions are read in full. Of an image, the header, the checksums and the end are checked; with `decode`, all pixels
    are decoded. Raises ShardError as `tarscan.members` does, with `duplicate` (a sample key twice), `pixels` (an image of more than
    MAX_PIXELS, before it is decoded), and `unreadable`: a sample without exactly one image, or without the label or caption that
    `kind` needs; a label that is not a number; a broken or truncated image.
    """
    seen: set[str] = set()
    with shard.open("rb") as stream:
        for sample in _samples(shard):
            key = sample[0].key
            if key in seen:
                raise ShardError(shard, "duplicate", f"sample {key!r} appears twice", _TOGETHER)
            seen.add(key)
            held = _members(sample, stream, shard, kind)
            by_suffix = {member.suffix: member for member in sample}
            picture = by_suffix[next(name for name in IMAGE_SUFFIXES if name in held)]
            data, text = held[picture.suffix], by_suffix.get("txt")
            size, kinds, plain = _picture(data, shard, f"{key}.{picture.suffix}", decode)
            captions = captions_of(held.get("txt", b""), shard, key)
            if kind == "retrieval":
                _need_caption(captions, shard, key)
            label = -1 if kind == "retrieval" else label_of(held["cls"], shard, key)
            yield Whole(picture, text if captions else None, label, data, size, kinds, plain)


def inspect(shard: Path, kind: str, decode: bool = False) -> Survey:
    """The survey of all samples of a shard. Raises ShardError as `samples_in` does."""
    labels, pictures = Counter[int](), Counter[str]()
    files: list[str] = []
    count, top = 0, ""
    for sample in samples_in(shard, kind, decode):
        count += 1
        pictures.update(sample.kinds)
        if kind == "retrieval":
            files.append(picture_id(sample.data))
        else:
            top = sample.picture.key if sample.label > max(labels, default=-1) else top
            labels[sample.label] += 1
    return Survey(count, tuple(sorted(labels.items())), top, tuple(sorted(pictures.items())), tuple(files))


def open_image(data: bytes, shard: Path | str, name: str) -> Image.Image:
    """An image whose header has been read and whose pixels have not. Raises ShardError: unreadable or pixels."""
    stream: BinaryIO = io.BytesIO(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(stream, formats=IMAGE_FORMATS)
    except Image.DecompressionBombError:
        raise ShardError(shard, "pixels", f"image {name!r} states an impossible size") from None
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
            shard, "unreadable", f"sample {key!r} has the class {label[:20]!r}, which is not a number",
            "Write the class's line number in classnames.txt, from 0.",
        )  # fmt: skip
    return int(label)


def check_label(label: int, classes: int, shard: Path, key: str) -> None:
    """Raise ShardError unless the label is below the number of classes."""
    if label >= classes:
        raise ShardError(
            shard, "unreadable", f"sample {key!r} has the class '{label}'; classnames.txt holds {classes} names",
            f"Labels are line numbers from 0: name the missing classes, or write labels below {classes}.",
        )  # fmt: skip


def captions_of(data: bytes, shard: Path | str, key: str) -> list[str]:
    """The captions in a .txt member, one per line, without blank lines. Raises ShardError if it is not UTF-8."""
    return [line.strip() for line in _text(data, shard, key).split("\n") if line.strip()]


def picture_id(data: bytes) -> str:
    """An identifier of a picture's bytes: 32 hex digits of their sha256. Equal files have equal identifiers."""
    return hashlib.sha256(data).hexdigest()[:32]


def repeated(pictures: Sequence[Hashable]) -> int:
    """The number of samples whose picture also occurs in another sample."""
    return sum(count for count in Counter(pictures).values() if count > 1)


def is_by_caption(pictures: Sequence[Hashable]) -> bool:
    """Whether a retrieval split has one sample per caption instead of one per picture.

    The criterion is that more than half of the samples share their picture with another sample. Fewer are taken for accidental copies, and
    each copy counts as a picture.
    """
    return 2 * repeated(pictures) > len(pictures)


def _members(sample: list[Member], stream: BinaryIO, shard: Path, kind: str) -> dict[str, bytes]:
    """The bytes of a sample's image and texts, by suffix. Raises ShardError if the image, label or caption is missing."""
    key = sample[0].key
    images = [member for member in sample if member.suffix in IMAGE_SUFFIXES]
    if len(images) != 1:
        raise ShardError(
            shard, "unreadable", f"sample {key!r} has {len(images)} images, expected one", _TOGETHER
        )
    if all(member.suffix != NEEDED_SUFFIX[kind] for member in sample):
        raise ShardError(
            shard, "unreadable", f"sample {key!r} has no .{NEEDED_SUFFIX[kind]} member ({kind})", _TOGETHER
        )
    held = {}
    for member in sample:
        if member.suffix != "json":
            stream.seek(member.offset)
            held[member.suffix] = stream.read(member.size)
    return held


def _need_caption(captions: list[str], shard: Path, key: str) -> None:
    if not captions:
        raise ShardError(shard, "unreadable", f"sample {key!r} has no caption")


def _picture(
    data: bytes, shard: Path, name: str, decode: bool
) -> tuple[tuple[int, int], tuple[str, ...], bool]:
    """Displayed height and width, kinds, and whether it is a plain JPEG. Raises ShardError for an incomplete picture."""
    image = open_image(data, shard, name)
    try:
        size, kinds = seen_size(image), tuple(kinds_of(image))
        if decode or not _ends(data, image):
            open_image(data, shard, name).load()
    except _BROKEN as error:
        raise ShardError(shard, "unreadable", f"image {name!r} cannot be decoded ({error})") from None
    return size, kinds, image.format == "JPEG" and image.mode in ("RGB", "L") and not kinds


def _ends(data: bytes, image: Image.Image) -> bool:
    """Whether the data of an image is complete by its format. If not, only decoding shows whether the image is usable."""
    if image.format == "PNG":
        try:
            Image.open(io.BytesIO(data), formats=("PNG",)).verify()  # the checksum of every chunk
        except _BROKEN:
            return False
        return True
    if image.format == "WEBP":
        return len(data) >= int.from_bytes(data[4:8], "little") + 8
    return _jpeg_ends(data)


def _jpeg_ends(data: bytes) -> bool:
    """Whether an end-of-image marker follows a scan. The marker of an embedded preview is inside a segment and is skipped."""
    at, scanned = 2, False
    while found := _JPEG_MARKER.search(data, at):
        marker, at = found[0], found.end()
        if marker == _END_OF_IMAGE:
            return scanned
        scanned = scanned or marker == _START_OF_SCAN
        at += int.from_bytes(data[at : at + 2], "big")
    return False


def _text(data: bytes, shard: Path | str, key: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise ShardError(shard, "unreadable", f"sample {key!r} holds text that is not UTF-8") from None


def _samples(shard: Path) -> Iterator[list[Member]]:
    """Members with consecutive equal keys form a sample, as in webdataset."""
    group: list[Member] = []
    for member in members(shard):
        if group and group[0].key != member.key:
            yield group
            group = []
        group.append(member)
    if group:
        yield group
