"""The icon sets of the mini suite, icons and icon_style, and the rendering of vector drawings.

Both sets use one package of icons, so its icons are divided between them.
Invariant: no icon is in both sets: an icon whose style is learned is not among those whose names are.
"""

import io
import json
import re
from functools import cache, partial
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image

from workers.data.mini.packages import find, find_one
from workers.data.mini.pictures import SIZE, Draft, Group, MiniDataset, Splits, by_quota, shrink, shuffled
from workers.data.mini.words import is_owned
from workers.data.writer import Sample

OUTLINES, FILLED = ("thin", "regular", "bold", "duotone"), "fill"
STYLES = ("thin", "light", "regular", "bold", "fill", "duotone")
ALIKE = 0.95
_NAMED = 850
"""The number of icons from which `icons` takes its 600; `icon_style` takes the others."""
_FILLED_IN = {"test": 360, "val": 120, "train": 120}


def icons() -> Draft:
    """600 icons, with their names as classes. Training has outlines of all and a fifth filled; test and validation have others filled."""
    groups = [
        Group(
            number,
            (
                tuple(Sample(_icon(name, style), number) for style in OUTLINES),
                (Sample(_icon(name, FILLED), number),),
            ),
        )
        for number, name in enumerate(_icon_names()[:_NAMED])
    ]
    return Draft(groups, ALIKE, partial(_finish_icons, _icon_names()))


def _finish_icons(names: list[str], groups: list[Group]) -> MiniDataset:
    splits: Splits = {"train": [], "val": [], "test": []}
    chosen = groups[: sum(_FILLED_IN.values())]
    filled_in = chain.from_iterable([split] * count for split, count in _FILLED_IN.items())
    for label, (group, split) in enumerate(zip(chosen, filled_in, strict=False)):
        outlines, filled = group.parts
        splits["train"] += [Sample(sample.image, label) for sample in outlines]
        splits[split] += [Sample(sample.image, label) for sample in filled]
    classes = tuple(names[group.kin].replace("-", " ") for group in chosen)
    return MiniDataset(classes, ("an icon of {c}",), splits)


def icon_style() -> Draft:
    """The drawing style of an icon, one of six; all styles of an icon are in one split."""
    groups = [
        Group(0, (tuple(Sample(_icon(name, style), label) for label, style in enumerate(STYLES)),))
        for name in _icon_names()[_NAMED : _NAMED + 470]
    ]
    return Draft(groups, ALIKE, _finish_icon_style)


def _finish_icon_style(groups: list[Group]) -> MiniDataset:
    splits = by_quota(groups, {"test": 80, "val": 40, "train": 300})
    return MiniDataset(STYLES, ("an icon drawn in {c} style",), splits)


@cache
def _icon_names() -> list[str]:
    """Names of the icons that exist in every style and have no owned word (`words`), in a fixed random order."""
    listed = json.loads(
        find_one("py-phosphor-icons", r"py_phosphor_icons/search/metadata\.json").read_text(encoding="utf-8")
    )
    drawn = _icon_files()
    names = sorted(
        entry["name"]
        for entry in listed
        if all((entry["name"], style) in drawn for style in STYLES) and not is_owned(entry["name"])
    )
    return shuffled(names, "icons")


@cache
def _icon_files() -> dict[tuple[str, str], Path]:
    pattern = r"py_phosphor_icons/svgs/flat/(\w+)/(.+?)(-\1)?\.svg"
    found = find("py-phosphor-icons", pattern)
    parts = {name: re.fullmatch(pattern, name) for name in found}
    return {(part[2], part[1]): found[name] for name, part in parts.items() if part is not None}


def _icon(name: str, style: str) -> np.ndarray:
    return render(_icon_files()[name, style].read_text(encoding="utf-8").replace("currentColor", "#000"))


def render(svg: str) -> np.ndarray:
    """uint8 [SIZE, SIZE, 3] of a square vector drawing, on white."""
    from resvg_py import svg_to_bytes

    png = bytes(svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, skip_system_fonts=True))
    return shrink(Image.open(io.BytesIO(png)))
