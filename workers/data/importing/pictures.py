"""Checks of every picture before a dataset is written: whether it can be read, and which pictures are equal.

Shards hold only readable pictures, and equal pictures must not be in two splits; both are known only after decoding.
Invariant: JPEG, PNG and WebP go into shards byte for byte; other formats become a PNG of the displayed picture. Two pictures are
equal if their displayed pixels are equal, whatever their files are.
"""

import hashlib
import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image

from workers.data.contents import MAX_PIXELS
from workers.data.importing.found import Found
from workers.data.pictures import as_seen
from workers.data.tarscan import MAX_MEMBER_BYTES
from workers.data.writer import Encoded

KEPT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
CONVERTED = ("GIF", "BMP", "TIFF", "PPM")
READ = ("JPEG", "PNG", "WEBP", *CONVERTED)
"""Formats that Pillow reads by itself. Formats whose readers start other programs are excluded."""
SAID_EVERY = 1000


@dataclass(frozen=True)
class Looked:
    """Digests of a picture: `pixels` of its displayed pixels, `content` (sha256) of its file. Both are the same on every machine."""

    pixels: str
    content: str


class Unreadable(Exception):
    """A picture that cannot be used; the message is the reason."""


def look(samples: Sequence[Found], say: Callable[[str], None]) -> tuple[list[Looked | None], list[str]]:
    """The digests of each picture (None: unusable), and one line for each unusable picture with its name and the reason."""
    found: list[Looked | None] = []
    faults = []
    for number, sample in enumerate(samples, start=1):
        try:
            data, image = _opened(sample)
            found.append(Looked(_pixels(image), hashlib.sha256(data).hexdigest()))
        except Unreadable as error:
            found.append(None)
            faults.append(f"{sample.where}: {error}")
        if number % SAID_EVERY == 0:
            say(f"checked {number:,} of {len(samples):,} pictures")
    return found, faults


def encoded(sample: Found) -> Encoded:
    """The picture as it is written into a shard. Raises Unreadable."""
    data, image = _opened(sample)
    if image.format in KEPT:
        return Encoded(KEPT[image.format], data)
    stream = io.BytesIO()
    as_seen(image).convert("RGB").save(stream, "PNG", compress_level=3)
    return Encoded("png", stream.getvalue())


def _opened(sample: Found) -> tuple[bytes, Image.Image]:
    """The bytes of a picture, and the decoded picture. Raises Unreadable."""
    try:
        data = sample.read()
    except OSError as error:
        raise Unreadable(error.strerror or str(error)) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=READ)
            if image.width * image.height > MAX_PIXELS or len(data) > MAX_MEMBER_BYTES:
                raise Unreadable(
                    f"{image.width}x{image.height} in {len(data):,} bytes is too large; at most {MAX_PIXELS:,} pixels"
                )
            image.load()
    except Image.DecompressionBombError:
        raise Unreadable("states an impossible size") from None
    except Image.UnidentifiedImageError:
        raise Unreadable(f"is not a picture of the formats {', '.join(READ)}") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise Unreadable(f"cannot be decoded ({error})") from None
    if image.mode == "F":
        raise Unreadable("holds floating-point values, which have no colours; save it with 8 or 16 bits")
    return data, image


def _pixels(image: Image.Image) -> str:
    seen = as_seen(image).convert("RGB")
    return hashlib.sha256(f"{seen.width}x{seen.height} ".encode() + seen.tobytes()).hexdigest()
