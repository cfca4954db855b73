"""Pictures of strangers, as the model sees them: bounded in bytes, pixels and work, decoded by a few threads.

Decoding happens before a request enters the queue, so a bad picture fails alone and takes no place in a batch.
Invariant: what comes out is, bit for bit, what evaluation decodes of the same file (`data.decode`); a picture that claims more pixels
than allowed is refused by its header, before any pixel is decoded.
"""

import asyncio
import io
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from workers.data.contents import IMAGE_FORMATS
from workers.data.decode import GEOMETRY, evaluation_geometry, height_and_width
from workers.data.pictures import as_seen
from workers.serving.batcher import Busy

MOST_SCANS = 100
"""Of a progressive JPEG. Each passes over the whole picture, and encoders write about ten."""
_START_OF_SCAN = b"\xff\xda"
Geometry = Callable[[Image.Image], Image.Image]


@dataclass(frozen=True)
class PictureLimits:
    """What one picture may be at most: bytes of its file, and pixels; `waiting` of them wait for one of `threads`."""

    bytes: int = 16 << 20
    pixels: int = 25_000_000
    threads: int = 2
    waiting: int = 64


class PictureRefused(Exception):
    """A picture that has no answer: `code` is picture.too_large, .pixels, .scans or .unreadable."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(code, detail)
        self.code, self.detail = code, detail


class Decoder:
    """Files of pictures to uint8 [H, W, 3], the size and geometry of a model's `preprocess` (open_clip's preprocess_cfg)."""

    def __init__(self, preprocess: Mapping[str, Any], limits: PictureLimits = PictureLimits()) -> None:
        size = height_and_width(preprocess["size"])
        given = {key: preprocess[key] for key in GEOMETRY if preprocess.get(key) is not None}
        self._geometry, self.limits = evaluation_geometry(size, given), limits
        self._pool = ThreadPoolExecutor(limits.threads, thread_name_prefix="decode")
        self._held = 0

    async def decode(self, data: bytes) -> np.ndarray:
        """One picture. Raises PictureRefused, and Busy if too many wait already."""
        if self._held >= self.limits.threads + self.limits.waiting:
            raise Busy(1)
        self._held += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._pool, decoded, data, self._geometry, self.limits)
        finally:
            self._held -= 1

    def close(self) -> None:
        """End the threads; what waits is not decoded."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def decoded(data: bytes, geometry: Geometry, limits: PictureLimits) -> np.ndarray:
    """uint8 [H, W, 3] of a JPEG, PNG or WebP file. Raises PictureRefused."""
    if len(data) > limits.bytes:
        raise PictureRefused("picture.too_large", f"a picture has at most {limits.bytes:,} bytes")
    if data.startswith(b"\xff\xd8") and data.count(_START_OF_SCAN) > MOST_SCANS:
        raise PictureRefused("picture.scans", f"a JPEG has at most {MOST_SCANS} scans")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        if image.width * image.height > limits.pixels:
            raise PictureRefused(
                "picture.pixels", f"it is {image.width} x {image.height}; at most {limits.pixels:,} pixels"
            )
        return np.array(geometry(as_seen(image)))
    except PictureRefused:
        raise
    except Image.DecompressionBombError:
        raise PictureRefused("picture.pixels", f"a picture has at most {limits.pixels:,} pixels") from None
    except Exception as error:  # Pillow's parsers raise many kinds for broken files
        raise PictureRefused(
            "picture.unreadable", f"it is no JPEG, PNG or WebP that can be decoded ({type(error).__name__})"
        ) from None
