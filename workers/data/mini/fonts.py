"""The sets of the mini suite that are drawn from typefaces: scripts (the writing system of a letter) and letters (A-Z).

Typefaces give many drawings of one letter, so the splits are separated by letter or by family of typefaces.
Invariant: in `scripts`, all weights of a letter are in one split; in `letters`, the typefaces of the three splits are of different
families. A drawing that several writing systems share (A, in Latin, Greek and Cyrillic) is in at most one of them.
"""

import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from workers.data.mini.packages import find, find_one
from workers.data.mini.pictures import Draft, Group, MiniDataset, as_stated, by_quota, shrink, shuffled
from workers.data.writer import Sample

# Writing system -> the prefix of its letters' Unicode names.
SCRIPTS = {
    "Arabic": "ARABIC LETTER", "Armenian": "ARMENIAN", "Bengali": "BENGALI LETTER", "Devanagari": "DEVANAGARI LETTER",
    "Ethiopic": "ETHIOPIC SYLLABLE", "Georgian": "GEORGIAN", "Gujarati": "GUJARATI LETTER", "Gurmukhi": "GURMUKHI LETTER",
    "Hebrew": "HEBREW LETTER", "Kannada": "KANNADA LETTER", "Khmer": "KHMER LETTER", "Lao": "LAO LETTER",
    "Malayalam": "MALAYALAM LETTER", "Myanmar": "MYANMAR LETTER", "Oriya": "ORIYA LETTER", "Sinhala": "SINHALA LETTER",
    "Tamil": "TAMIL LETTER", "Telugu": "TELUGU LETTER", "Thai": "THAI CHARACTER", "Latin": "LATIN", "Greek": "GREEK",
    "Cyrillic": "CYRILLIC",
}  # fmt: skip
_IN_GENERAL_FONT = ("Latin", "Greek", "Cyrillic")
_CANVAS, _EM, _SMALLER_EM = 96, 56, 42
_CANDIDATES = 120
_NOTO_SANS = r"manimgx_fonts/NotoSans(-Italic)?\[wght\]\.ttf"
_FAMILIES = {
    "test": r"matplotlib/mpl-data/fonts/ttf/(STIXGeneral\w*|cmb10|cmmi10|cmr10|cmss10|cmti10|cmtt10)\.ttf",
    "val": r"matplotlib/mpl-data/fonts/ttf/DejaVuSerif(-\w+)?\.ttf",
    "train": r"matplotlib/mpl-data/fonts/ttf/DejaVuSans(Mono)?(-\w+)?\.ttf",
}
ALIKE = 0.97


def scripts() -> Draft:
    """Letters of 22 writing systems, each in the three weights of its typeface."""
    groups = []
    for label, (script, prefix) in enumerate(SCRIPTS.items()):
        family = "" if script in _IN_GENERAL_FONT else script
        path = find_one("manimgx-fonts", rf"manimgx_fonts/NotoSans{family}\[wght\]\.ttf")
        faces = [typeface(path, weight) for weight in weights(path)]
        for letter in shuffled(_letters(path, prefix), f"scripts {script}")[:_CANDIDATES]:
            groups.append(Group(label, (tuple(Sample(draw(face, letter), label) for face in faces),)))
    return Draft(groups, ALIKE, _finish_scripts)


def letters() -> Draft:
    """A-Z in both cases: training in sans typefaces and two sizes, validation in DejaVu Serif, test in STIX and Computer Modern."""
    groups = []
    for split, pattern in _FAMILIES.items():
        drawn: list[tuple[Path, float | None]] = [
            (path, None) for path in find("matplotlib", pattern).values()
        ]
        if split == "train":
            noto = find("manimgx-fonts", _NOTO_SANS).values()
            drawn += [(path, weight) for path in noto for weight in weights(path)]
        sizes = (_EM, _SMALLER_EM) if split == "train" else (_EM,)
        faces = [typeface(path, weight, size) for size in sizes for path, weight in drawn]
        groups += [group for face in faces for group in _alphabet(face, split)]
    return Draft(groups, ALIKE, _finish_letters)


def _finish_scripts(groups: list[Group]) -> MiniDataset:
    splits = by_quota(groups, {"test": 8, "val": 4, "train": 30})
    return MiniDataset(tuple(SCRIPTS), ("a letter of the {c} script",), splits)


def _finish_letters(groups: list[Group]) -> MiniDataset:
    classes = tuple(chr(ord("A") + number) for number in range(26))
    return MiniDataset(classes, ("a printed letter {c}",), as_stated(groups))


def _alphabet(face: ImageFont.FreeTypeFont, split: str) -> list[Group]:
    return [
        Group(number, ((Sample(draw(face, chr(first + number)), number),),), split)
        for number in range(26)
        for first in (ord("A"), ord("a"))
    ]


def weights(path: Path) -> tuple[float, ...]:
    """The lightest, middle and heaviest weight of a variable typeface; weights beyond its axis draw the same glyphs."""
    axis = ImageFont.truetype(str(path), _EM).get_variation_axes()[0]
    lightest, heaviest = float(axis["minimum"] or 0), float(axis["maximum"] or 0)
    return lightest, (lightest + heaviest) / 2, heaviest


def typeface(path: Path, weight: float | None, size: int = _EM) -> ImageFont.FreeTypeFont:
    """The typeface at `size` pixels; `weight` is for variable typefaces."""
    face = ImageFont.truetype(str(path), size)
    if weight is not None:
        face.set_variation_by_axes([weight] + [100.0] * (len(face.get_variation_axes()) - 1))
    return face


def has(face: ImageFont.FreeTypeFont, sign: str) -> bool:
    """Whether the typeface has a visible glyph for the character, other than that of missing characters."""
    left, top, right, bottom = face.getbbox(sign)
    return (
        right - left >= 2
        and bottom - top >= 2
        and bytes(face.getmask(sign)) != bytes(face.getmask("\U0010fffd"))
    )


def _letters(path: Path, prefix: str) -> list[str]:
    """The letters of a script for which the typeface has glyphs."""
    face = typeface(path, None)
    named = (chr(code) for code in range(0x41, 0x3000) if unicodedata.name(chr(code), "").startswith(prefix))
    return [letter for letter in named if unicodedata.category(letter)[0] == "L" and has(face, letter)]


def draw(face: ImageFont.FreeTypeFont, sign: str) -> np.ndarray:
    """uint8 [SIZE, SIZE, 3]: the character in black, centred on white."""
    image = Image.new("L", (_CANVAS, _CANVAS), 255)
    canvas = ImageDraw.Draw(image)
    left, top, right, bottom = canvas.textbbox((0, 0), sign, font=face)
    place = (_CANVAS / 2 - (left + right) / 2, _CANVAS / 2 - (top + bottom) / 2)
    canvas.text(place, sign, font=face, fill=0)
    return shrink(image)
