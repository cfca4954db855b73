"""Plans and merges are today what they were when `pinned.json` was written, however they are carried out."""

import json
from typing import Any

import pytest

from tests.pins import pins

PINNED = json.loads(pins.PINNED.read_text())
WAYS: dict[str, dict[str, Any]] = {
    "one-thread": {},
    "three-threads-small-blocks": {"threads": 3, "block": 16},
}


def test_no_fingerprint_of_a_study_under_configs_has_moved() -> None:
    assert pins.plans() == PINNED["plans"]


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("name", pins.TECHNIQUES)
def test_no_byte_of_a_merge_has_moved(name: str, way: dict[str, Any]) -> None:
    assert pins.merges(name, **way) == PINNED["merges"][name]
