"""Pictures as a person sees them, where open_clip's preprocessing sees something else.

open_clip calls `convert("RGB")` and nothing else: 16-bit grey is cut off at 255, transparency is dropped (what lies beneath it
shows), and the orientation that a camera noted in EXIF is not applied. Models learn from pictures as people upload, see and
label them, so all three are converted here, before open_clip's own geometry.
Invariant: any other picture passes through untouched, so that its pixels equal open_clip's bit for bit.
"""

import warnings

import numpy as np
from PIL import Image

REVISION = 1
"""Raise it when `as_seen` changes what it gives: results over such pictures are then made again, and no others."""

GREY16, TRANSPARENT, TURNED = "16-bit grey", "transparent", "turned by EXIF"
CONVERTED = (GREY16, TRANSPARENT, TURNED)
CMYK, ANIMATED = "CMYK", "animated"
KINDS = {
    GREY16: "scaled to 8 bits (plain open_clip cuts them off at 255)",
    TRANSPARENT: "drawn on white, or on black where white hides everything (plain open_clip drops the alpha channel)",
    TURNED: "turned as their EXIF orientation says (plain open_clip does not turn them)",
    CMYK: "converted without their colour profile, as plain open_clip does",
    ANIMATED: "read as their first frame, as plain open_clip does",
}
"""What is done about each kind of picture that is not plain 8-bit grey or RGB."""

FAINT = 26
"""A picture whose lightest and darkest value differ by less (of 255) shows nothing to a person."""

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


def kinds_of(image: Image.Image) -> list[str]:
    """The `KINDS` that an opened picture is of; pixels are decoded only where there is an alpha channel to look at.

    Raises what Pillow raises for broken data.
    """
    turn = _turn(image)  # first of all, for Pillow finds more in a picture once it is decoded
    found = {
        GREY16: image.mode.startswith("I"),
        TRANSPARENT: _is_transparent(image),
        TURNED: turn is not None,
        CMYK: image.mode == "CMYK",
        ANIMATED: image.format in ("PNG", "WEBP") and getattr(image, "n_frames", 1) > 1,
    }
    return [kind for kind in KINDS if found[kind]]


def as_seen(image: Image.Image) -> Image.Image:
    """The picture as a viewer shows it: turned, in 8 bits, without holes. The same object where nothing is to be done."""
    turn = _turn(image)
    transparent = _is_transparent(image)
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    if transparent:
        image = _without_holes(image.convert("RGBA"))
    return image if turn is None else image.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What undoes the camera's turn; a damaged EXIF block says nothing, as in viewers.

    Of a PNG only what stands before its pixels counts: to look behind them, Pillow would decode the whole.
    """
    if image.format == "PNG" and not {"exif", "Raw profile type exif"} & image.info.keys():
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # Pillow's parser raises many kinds for EXIF that is no EXIF
        return None


def _is_transparent(image: Image.Image) -> bool:
    if not image.has_transparency_data:
        return False
    if image.mode.startswith("I"):
        return bool((np.asarray(image) == image.info["transparency"]).any())
    return int(np.asarray(image.convert("RGBA"))[..., 3].min()) < 255


def _eight_bits(image: Image.Image) -> Image.Image:
    """0 to 65535 as 0 to 255, rounded; the one transparent value of the picture, if there is one, as alpha 0."""
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
