"""Plans, merges, tracking and help equal their pins, however they are carried out."""

import json
from pathlib import Path
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


def test_nothing_that_mlflow_holds_of_a_study_has_moved(empty_store: Path) -> None:
    assert pins.tracked(empty_store) == json.loads(pins.TRACKED.read_text())


def test_no_help_of_a_command_has_moved() -> None:
    assert pins.helps() == json.loads(pins.HELP.read_text())
