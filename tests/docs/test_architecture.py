"""The page about the architecture agrees with the folders and with the rules that tests enforce."""

import itertools
import re

import pytest

from tests.house import ROOMS
from tests.test_house import FLOORS
from tests.world import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
FILES = sorted(set(re.findall(r"`([\w/]+(?:\.py|/))`", PAGE)))


@pytest.mark.parametrize("name", FILES)
def test_file_or_folder_that_the_page_names_is_there(name: str) -> None:
    found = [place for place in (ROOT, *(ROOT / room for room in ROOMS)) if (place / name).exists()]
    engines = ROOT / "workers" / "training" / "engines"
    assert found or (engines / name).exists(), f"docs/architecture.md names {name}"


@pytest.mark.parametrize("room", [room for room in FLOORS if FLOORS[room]])
def test_floors_of_the_page_are_those_that_the_house_keeps(room: str) -> None:
    said = re.search(rf"- `{room}/`: ((?:[^\n]|\n  )*)", PAGE)
    assert said, room
    floors = {folder: floor for floor, folders in enumerate(FLOORS[room]) for folder in folders}
    named = [re.findall(r"`(\w+)`", part) for part in said[1].split("<")]
    there = {path.name for path in (ROOT / room).iterdir() if (path / "__init__.py").is_file()}
    assert there & floors.keys() <= {name for part in named for name in part}
    for lower, upper in itertools.pairwise(named):
        assert max(floors[name] for name in lower) < min(floors[name] for name in upper), (lower, upper)
