"""The sets of the mini suite that are drawn from typefaces: scripts (which writing system?) and letters (which letter?).

Test letters of `scripts` are not among its training letters; test typefaces of `letters` are of other families than its
training typefaces.
"""

import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from workers.data.mini_packages import find, find_one
from workers.data.mini_pictures import MiniDataset, shrink, shuffled
from workers.data.writer import Sample

# Writing system -> how Unicode names its letters.
SCRIPTS = {
    "Arabic": "ARABIC LETTER", "Armenian": "ARMENIAN", "Bengali": "BENGALI LETTER", "Devanagari": "DEVANAGARI LETTER",
    "Ethiopic": "ETHIOPIC SYLLABLE", "Georgian": "GEORGIAN", "Gujarati": "GUJARATI LETTER", "Gurmukhi": "GURMUKHI LETTER",
    "Hebrew": "HEBREW LETTER", "Kannada": "KANNADA LETTER", "Khmer": "KHMER LETTER", "Lao": "LAO LETTER",
    "Malayalam": "MALAYALAM LETTER", "Myanmar": "MYANMAR LETTER", "Oriya": "ORIYA LETTER", "Sinhala": "SINHALA LETTER",
    "Tamil": "TAMIL LETTER", "Telugu": "TELUGU LETTER", "Thai": "THAI CHARACTER", "Latin": "LATIN", "Greek": "GREEK",
    "Cyrillic": "CYRILLIC",
}  # fmt: skip
_IN_GENERAL_FONT = ("Latin", "Greek", "Cyrillic")
_CANVAS, _EM = 96, 56
_TRAIN_FACES = r"matplotlib/mpl-data/fonts/ttf/DejaVu(Sans|SansMono|Serif)(-\w+)?\.ttf"
_TEST_FACES = r"matplotlib/mpl-data/fonts/ttf/(STIXGeneral\w*|cmb10|cmmi10|cmr10|cmss10|cmti10|cmtt10)\.ttf"


def scripts(train: int = 30, test: int = 12) -> MiniDataset:
    """Letters of 22 writing systems; up to `train` letters in four weights and `test` other letters in two."""
    splits: dict[str, list[Sample]] = {"train": [], "test": []}
    for label, (script, prefix) in enumerate(SCRIPTS.items()):
        family = "" if script in _IN_GENERAL_FONT else script
        path = find_one("manimgx-fonts", rf"manimgx_fonts/NotoSans{family}\[wght\]\.ttf")
        letters = shuffled(_letters(path, prefix), f"scripts {script}")
        cut = min(test, len(letters) // 4)
        for split, chosen, weights in (
            ("test", letters[:cut], (300.0, 700.0)),
            ("train", letters[cut : cut + train], (100.0, 300.0, 500.0, 700.0)),
        ):
            for weight in weights:
                face = _typeface(path, weight)
                drawn = [_draw(face, letter) for letter in chosen]
                splits[split] += [Sample(image, label) for image in drawn if image is not None]
    return MiniDataset(tuple(SCRIPTS), ("a letter of the {c} script",), splits)


def letters() -> MiniDataset:
    """A-Z in both cases; DejaVu and Noto Sans for training, STIX and Computer Modern for the test."""
    noto = find("manimgx-fonts", r"manimgx_fonts/NotoSans(-Italic)?\[wght\]\.ttf").values()
    faces = {
        "train": [_typeface(path, None) for path in find("matplotlib", _TRAIN_FACES).values()]
        + [_typeface(path, weight) for path in noto for weight in (100.0, 300.0, 500.0, 700.0, 900.0)],
        "test": [_typeface(path, None) for path in find("matplotlib", _TEST_FACES).values()],
    }
    splits = {
        split: [sample for face in chosen for sample in _alphabet(face)] for split, chosen in faces.items()
    }
    return MiniDataset(
        tuple(chr(ord("A") + number) for number in range(26)), ("a printed letter {c}",), splits
    )


def _alphabet(face: ImageFont.FreeTypeFont) -> list[Sample]:
    drawn = [
        (_draw(face, chr(first + number)), number) for number in range(26) for first in (ord("A"), ord("a"))
    ]
    return [Sample(image, number) for image, number in drawn if image is not None]


def _typeface(path: Path, weight: float | None) -> ImageFont.FreeTypeFont:
    face = ImageFont.truetype(str(path), _EM)
    if weight is not None:
        face.set_variation_by_axes([weight] + [100.0] * (len(face.get_variation_axes()) - 1))
    return face


def _letters(path: Path, prefix: str) -> list[str]:
    """The letters of a script that the typeface really has."""
    face = ImageFont.truetype(str(path), _EM)
    absent = bytes(face.getmask("\U0010fffd"))
    named = (chr(code) for code in range(0x41, 0x3000) if unicodedata.name(chr(code), "").startswith(prefix))
    return [
        letter
        for letter in named
        if unicodedata.category(letter)[0] == "L" and bytes(face.getmask(letter)) != absent
    ]


def _draw(face: ImageFont.FreeTypeFont, letter: str) -> np.ndarray | None:
    """The letter in black, centred on white; None if it leaves no mark."""
    image = Image.new("L", (_CANVAS, _CANVAS), 255)
    canvas = ImageDraw.Draw(image)
    left, top, right, bottom = canvas.textbbox((0, 0), letter, font=face)
    if right - left < 2 or bottom - top < 2:
        return None
    place = (_CANVAS / 2 - (left + right) / 2, _CANVAS / 2 - (top + bottom) / 2)
    canvas.text(place, letter, font=face, fill=0)
    return shrink(image)
