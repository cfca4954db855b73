"""Unusual pictures are converted to what a viewer shows, and plain pictures stay unchanged."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from workers.data.pictures import ANIMATED, CMYK, GREY16, TRANSPARENT, TURNED, as_seen, kinds_of

DRAWN = np.zeros((24, 16), np.uint8)
DRAWN[3:20, 4:7], DRAWN[16:20, 4:13] = 255, 180  # an L, so that every turn of it is another picture


def file(image: Image.Image, form: str = "PNG", **more: Any) -> Image.Image:
    """The image after it was written and opened again."""
    stream = io.BytesIO()
    image.save(stream, form, **more)
    return Image.open(stream)


def grey(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L")).astype(int)


def ink(level: int, mode: str = "RGBA") -> Image.Image:
    """The drawing as the alpha channel of one colour."""
    pixels = np.full((*DRAWN.shape, 4), level, np.uint8)
    pixels[..., 3] = DRAWN
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("top", [65535, 255 * 257, 128])
def test_sixteen_bit_grey_keeps_its_shades(top: int) -> None:
    image = file(Image.fromarray((DRAWN.astype(np.uint32) * top // 255).astype(np.uint16)))
    assert kinds_of(image) == [GREY16]
    assert np.abs(grey(as_seen(image)) - DRAWN.astype(int) * top / 65535).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("form", ["PNG", "WEBP"])
@pytest.mark.parametrize("level", [0, 255])
def test_ink_is_seen_on_the_paper_that_shows_it(mode: str, form: str, level: int) -> None:
    image = file(ink(level, mode), form, **({"lossless": True, "exact": True} if form == "WEBP" else {}))
    assert kinds_of(image) == [TRANSPARENT]
    seen = grey(as_seen(image))
    assert np.abs(seen - (DRAWN.astype(int) if level else 255 - DRAWN.astype(int))).max() <= 1


def test_colours_under_full_transparency_are_not_seen() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 4)).astype(np.uint8)
    pixels[..., 3] = 0
    pixels[2:4, 2:4] = (200, 10, 10, 255)
    seen = np.asarray(as_seen(file(Image.fromarray(pixels))))
    assert (seen[pixels[..., 3] == 0] == 255).all() and (seen[2:4, 2:4] == (200, 10, 10)).all()


@pytest.mark.parametrize("hole", [5, bytes([255] * 5 + [0])])
def test_transparent_colour_of_a_palette_is_paper(hole: int | bytes) -> None:
    image = Image.fromarray(np.where(DRAWN > 0, 9, 5).astype(np.uint8))
    image.putpalette([value for index in range(256) for value in (index * 20 % 256, 0, 0)])
    opened = file(image, transparency=hole)
    assert kinds_of(opened) == [TRANSPARENT]
    seen = np.asarray(as_seen(opened))
    assert (seen[DRAWN == 0] == 255).all() and (seen[DRAWN > 0] == (180, 0, 0)).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_transparent_shade_of_grey_is_paper(dtype: type) -> None:
    scale = 257 if dtype is np.uint16 else 1
    opened = file(
        Image.fromarray((np.where(DRAWN > 0, 30, 90) * scale).astype(dtype)), transparency=90 * scale
    )
    assert TRANSPARENT in kinds_of(opened)
    assert np.array_equal(grey(as_seen(opened)), np.where(DRAWN > 0, 30, 255))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_undone(orientation: int, form: str) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x112] = orientation
    image = file(Image.fromarray(DRAWN).convert("RGB"), form, exif=exif)
    assert kinds_of(image) == ([TURNED] if orientation > 1 else [])
    assert np.array_equal(np.asarray(as_seen(image)), np.asarray(ImageOps.exif_transpose(image)))


def test_exif_that_is_none_turns_nothing() -> None:
    image = file(Image.fromarray(DRAWN), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xffgarbage")
    assert kinds_of(image) == [] and as_seen(image) is image


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_animation_is_said_and_read_as_its_first_frame(form: str) -> None:
    one, two = Image.fromarray(DRAWN).convert("RGB"), Image.new("RGB", (16, 24), "red")
    image = file(
        one, form, save_all=True, append_images=[two], **({"lossless": True} if form == "WEBP" else {})
    )
    assert kinds_of(image) == [ANIMATED]
    assert np.array_equal(np.asarray(as_seen(image).convert("RGB")), np.asarray(one))


def test_cmyk_is_said_and_left_to_open_clip() -> None:
    image = file(Image.fromarray(DRAWN).convert("CMYK"), "JPEG")
    assert kinds_of(image) == [CMYK] and as_seen(image) is image


@pytest.mark.parametrize(
    "make",
    [
        lambda: file(Image.fromarray(DRAWN).convert("RGB"), "JPEG"), lambda: file(Image.fromarray(DRAWN), "JPEG"),
        lambda: file(Image.fromarray(DRAWN).convert("RGB")), lambda: file(Image.fromarray(DRAWN)),
        lambda: file(Image.fromarray(DRAWN).convert("P")), lambda: file(Image.fromarray(DRAWN).convert("1")),
        lambda: file(Image.fromarray(DRAWN).convert("RGBA")), lambda: file(Image.fromarray(DRAWN).convert("LA")),
        lambda: file(Image.fromarray(DRAWN).convert("RGB"), "WEBP"),
    ],
)  # fmt: skip
def test_plain_picture_is_the_very_same_object(make: Callable[[], Image.Image]) -> None:
    image = make()
    assert kinds_of(image) == [] and as_seen(image) is image
