"""Whether the members of a shard make up samples we can train on.

Invariant: a shard that passes holds nothing but whole samples: one image each, of a kind and size that is safe to decode,
with the label or caption its dataset needs.
"""

import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from workers.data.tarscan import IMAGE_SUFFIXES, Member, ShardError, members

MAX_PIXELS = 50_000_000
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
NEEDED_SUFFIX = {"classification": "cls", "retrieval": "txt"}


def inspect(shard: Path, kind: str) -> int:
    """Read a shard's headers and image headers; return its number of samples.

    Raises ShardError as `tarscan.members` does, and: unreadable (a sample without exactly one image, without the label or
    caption that `kind` needs, or an image with a broken header), pixels (an image beyond MAX_PIXELS, before decoding it).
    """
    count, seen = 0, set()
    with shard.open("rb") as stream:
        for sample in _samples(shard):
            key = sample[0].key
            if key in seen:
                raise ShardError(shard, "duplicate", f"sample {key!r} appears twice")
            seen.add(key)
            images = [member for member in sample if member.suffix in IMAGE_SUFFIXES]
            if len(images) != 1:
                raise ShardError(
                    shard, "unreadable", f"sample {key!r} has {len(images)} images, expected one"
                )
            if all(member.suffix != NEEDED_SUFFIX[kind] for member in sample):
                raise ShardError(
                    shard, "unreadable", f"sample {key!r} has no .{NEEDED_SUFFIX[kind]} member ({kind})"
                )
            stream.seek(images[0].offset)
            open_image(stream.read(images[0].size), shard, images[0].name)
            count += 1
    return count


def open_image(data: bytes, shard: Path, name: str) -> Image.Image:
    """An image whose header is read and whose pixels are not yet. Raises ShardError: unreadable or pixels."""
    stream: BinaryIO = io.BytesIO(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(stream, formats=IMAGE_FORMATS)
    except Image.DecompressionBombError:
        raise ShardError(shard, "pixels", f"image {name!r} claims a size no photograph has") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise ShardError(shard, "unreadable", f"image {name!r} cannot be opened ({error})") from None
    if image.width * image.height > MAX_PIXELS:
        raise ShardError(
            shard, "pixels", f"image {name!r} is {image.width}x{image.height}; at most {MAX_PIXELS} pixels"
        )
    return image


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
