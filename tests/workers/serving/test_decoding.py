"""Pictures of strangers are bounded before they are decoded."""

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.serving_toys import picture
from workers.data.decode import evaluation_geometry
from workers.serving.decoding import MOST_SCANS, PictureLimits, PictureRefused, decoded

GEOMETRY = evaluation_geometry([32, 32], {"interpolation": "bilinear"})


def refusal(data: bytes, limits: PictureLimits = PictureLimits()) -> str:
    with pytest.raises(PictureRefused) as refused:
        decoded(data, GEOMETRY, limits)
    assert "/" not in refused.value.detail  # no path
    return refused.value.code


def png_that_claims(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 4096))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_picture_of_each_kind_becomes_the_models_size(kind: str) -> None:
    found = decoded(picture(3, (90, 45), kind), GEOMETRY, PictureLimits())
    assert found.shape == (32, 32, 3) and found.dtype == np.uint8 and found.std() > 5


@pytest.mark.parametrize("size", [(60_000, 60_000), (13_000, 13_000), (5001, 5000)])
def test_bomb_is_refused_by_its_header(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("pixels were decoded"))
    assert refusal(png_that_claims(*size)) == "picture.pixels"


def test_file_that_is_too_long_is_refused_unread() -> None:
    assert refusal(picture(), PictureLimits(bytes=100)) == "picture.too_large"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a picture",
        b"GIF89a" + b"\0" * 60,
        b"\xff\xd8\xff",
        b"RIFF\xff\xff\xff\xffWEBPVP8X",
        b"<svg/>",
        picture()[:300],
        picture(kind="JPEG")[:200],
        b"\x89PNG\r\n\x1a\n" + b"\0" * 30,
    ],
)
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    assert refusal(data) == "picture.unreadable"


def test_every_cut_and_every_flipped_byte_is_a_picture_or_a_refusal() -> None:
    for kind in ("PNG", "JPEG", "WEBP"):
        whole = picture(1, (20, 20), kind)
        rng = np.random.default_rng(0)
        for _ in range(150):
            data = bytearray(whole[: rng.integers(1, len(whole) + 1)])
            data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
            with contextlib.suppress(PictureRefused):
                assert decoded(bytes(data), GEOMETRY, PictureLimits()).shape == (32, 32, 3)


def test_jpeg_of_endless_scans_is_refused() -> None:
    out = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(out, "JPEG", progressive=True)
    assert decoded(out.getvalue(), GEOMETRY, PictureLimits()).shape == (32, 32, 3)
    assert refusal(out.getvalue() + b"\xff\xda\x00\x08" * MOST_SCANS) == "picture.scans"
