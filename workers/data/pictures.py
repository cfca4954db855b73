"""Pictures as they are displayed, in the cases where open_clip's preprocessing decodes something else.

open_clip only calls `convert("RGB")`: 16-bit grey is clipped at 255, an alpha channel is dropped (its hidden colours appear), and the
EXIF orientation is ignored. Labels and captions describe the displayed picture, so these three cases are converted before
open_clip's geometry.
Invariant: any other picture passes through unchanged, so its pixels equal open_clip's bit for bit.
"""

import warnings

import numpy as np
from PIL import Image

REVISION = 1
"""Increase it when results of `as_seen` change; steps on data with such pictures are then computed again, and no others."""

GREY16, TRANSPARENT, TURNED = "16-bit grey", "transparent", "turned by EXIF"
CONVERTED = (GREY16, TRANSPARENT, TURNED)
CMYK, ANIMATED = "CMYK", "animated"
KINDS = {
    GREY16: "scaled to 8 bits (plain open_clip clips them at 255)",
    TRANSPARENT: "composited on white, or on black if white would hide everything (plain open_clip drops the alpha channel)",
    TURNED: "rotated by their EXIF orientation (plain open_clip does not rotate them)",
    CMYK: "converted without their colour profile, as plain open_clip does",
    ANIMATED: "read as their first frame, as plain open_clip does",
}
"""The treatment of each kind of picture that is not plain 8-bit grey or RGB."""

FAINT = 26
"""A picture whose lightest and darkest values differ by less (of 255) looks blank."""

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_LYING = {_TURNS[5], _TURNS[6], _TURNS[7], _TURNS[8]}
"""Rotations that exchange height and width."""


def kinds_of(image: Image.Image) -> list[str]:
    """The `KINDS` of an opened picture; pixels are decoded only if there is an alpha channel to check.

    Raises what Pillow raises for broken data.
    """
    turn = _turn(image)  # first, since decoding adds EXIF that follows the pixels
    found = {
        GREY16: image.mode.startswith("I"),
        TRANSPARENT: _is_transparent(image),
        TURNED: turn is not None,
        CMYK: image.mode == "CMYK",
        ANIMATED: image.format in ("PNG", "WEBP") and getattr(image, "n_frames", 1) > 1,
    }
    return [kind for kind in KINDS if found[kind]]


def seen_size(image: Image.Image) -> tuple[int, int]:
    """Height and width of `as_seen` in pixels; no pixel is decoded."""
    lies = _turn(image) in _LYING
    return (image.width, image.height) if lies else (image.height, image.width)


def as_seen(image: Image.Image) -> Image.Image:
    """The picture as a viewer shows it: rotated, in 8 bits, opaque. The same object if no conversion is needed."""
    turn = _turn(image)
    transparent = _is_transparent(image)
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    if transparent:
        image = _without_holes(image.convert("RGBA"))
    return image if turn is None else image.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """The rotation that the EXIF orientation asks for; a damaged EXIF block is ignored, as in viewers.

    In a PNG only EXIF before the pixels counts, since Pillow would have to decode the picture to reach a later block.
    """
    if image.format == "PNG" and not {"exif", "Raw profile type exif"} & image.info.keys():
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # Pillow's parser raises many kinds for malformed EXIF
        return None


def _is_transparent(image: Image.Image) -> bool:
    if not image.has_transparency_data:
        return False
    if image.mode.startswith("I"):
        return bool((np.asarray(image) == image.info["transparency"]).any())
    return int(np.asarray(image.convert("RGBA"))[..., 3].min()) < 255


def _eight_bits(image: Image.Image) -> Image.Image:
    """0..65535 scaled to 0..255 and rounded; the transparent value of the picture, if any, becomes alpha 0."""
    values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
    grey = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if "transparency" in image.info:
        hole = np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)
        grey.putalpha(Image.fromarray(hole))
    return grey


def _without_holes(image: Image.Image) -> Image.Image:
    white = _on(image, "white")
    if _contrast(white) >= FAINT:
        return white
    black = _on(image, "black")
    return black if _contrast(black) > _contrast(white) else white


def _on(image: Image.Image, colour: str) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", image.size, colour), image).convert("RGB")


def _contrast(image: Image.Image) -> int:
    return int(np.ptp(np.asarray(image), axis=(0, 1)).max())
