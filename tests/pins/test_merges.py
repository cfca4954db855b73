"""Merges write the bytes of `merges.json`, in every form and however they are carried out."""

import json
from collections.abc import Iterator

import pytest

from tests.pins import merges

PINNED = json.loads(merges.PINNED.read_text())
FIRST, *OTHERS = merges.WAYS


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[merges.Files]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda handle: None)  # nothing here outlives the test
        yield merges.Files(tmp_path_factory.mktemp("pins"))


@pytest.fixture(scope="module")
def first(files: merges.Files) -> dict[str, dict[str, str]]:
    """Every case, carried out in the first way."""
    return {case.name: files.merged(case, merges.WAYS[FIRST]) for case in merges.CASES}


def test_no_byte_of_a_merge_in_any_form_has_moved(first: dict[str, dict[str, str]]) -> None:
    pinned = {case.name: first[case.name] for case in merges.CASES if case.is_pinned}
    assert pinned == PINNED


@pytest.mark.parametrize("way", OTHERS)
@pytest.mark.parametrize("case", merges.CASES, ids=lambda case: case.name)
def test_way_to_carry_a_merge_out_changes_no_byte(
    case: merges.Case, way: str, files: merges.Files, first: dict[str, dict[str, str]]
) -> None:
    if merges.allows(case, way):
        found = files.merged(case, merges.WAYS[way])
        assert found == {form: first[case.name][form] for form in found}
