"""Every family of models: a merge of folders is a folder that its library opens, and computes what a merge in torch computes."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.pipeline.recipes import families

QUICK = ("Qwen2", "T5")
OF_ALL = ("average", "task_arithmetic", "magmax")
CASES = [
    pytest.param(family, technique, marks=() if family in QUICK else pytest.mark.slow)
    for family in families.GIVEN
    for technique in (families.TECHNIQUES if family in QUICK else OF_ALL)
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Path]]:
    made: dict[str, list[Path]] = {}

    def of(family: str) -> list[Path]:
        if family not in made:
            made[family] = families.made(family, tmp_path_factory.mktemp("family"))
        return made[family]

    return of


@pytest.mark.parametrize(("family", "technique"), CASES)
def test_output_folder_opens_and_computes_what_a_merge_in_torch_does(
    family: str, technique: str, folders: Callable[[str], list[Path]], tmp_path: Path
) -> None:
    assert families.apart(family, technique, folders(family), tmp_path) < families.LIMIT


def test_table_of_the_page_has_every_family_and_technique_below_the_limit() -> None:
    _, _, rest = families.PAGE.read_text().partition(families.MARKS[0])
    head, _, *rows = rest.partition(families.MARKS[1])[0].strip().splitlines()
    assert [one.strip(" `") for one in head.strip("|").split("|")] == ["family", *families.TECHNIQUES]
    cells = [[one.strip() for one in row.strip("|").split("|")] for row in rows]
    assert [row[0] for row in cells] == list(families.GIVEN)
    assert all(float(one) < families.LIMIT for row in cells for one in row[1:])
