"""The list of deliberately broken lines stays valid, and a trial distinguishes caught from survived. `make mutants` tries all."""

from pathlib import Path

import pytest

from tests.mutants import MUTANTS, ROOT, Mutant, problems, try_all

SOURCE = "def double(x):\n    return 2 * x\n\n\ndef half(x):\n    return x / 2\n"
TESTS = """
from room.core import double, half

def test_double():
    assert double(3) == 6

def test_half():
    assert half(0) == 0
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A project of one module, with a test of it that can fail and one that cannot."""
    for name, text in (("room/core.py", SOURCE), ("tests/test_core.py", TESTS)):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    return tmp_path


def mutant(text: str, instead: str, test: str = "test_double") -> Mutant:
    return Mutant("room/core.py", text, instead, f"tests/test_core.py::{test}")


def test_every_mutant_of_the_list_has_its_line_once_and_a_test_that_is_there() -> None:
    assert problems(MUTANTS, ROOT) == []
    assert len(MUTANTS) >= 33


def test_mutant_that_no_test_notices_survives_and_the_tree_stays_as_it_was(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    caught, missed = mutant("2 * x", "3 * x"), mutant("x / 2", "x / 3", "test_half")
    assert try_all([caught, missed], tree, copies=1) == 1
    said = capsys.readouterr().out
    assert "2 * x: caught" in said and "x / 2: SURVIVED" in said and "1 of 2 mutants caught" in said
    assert (tree / "room/core.py").read_text() == SOURCE


def test_test_that_fails_anyway_catches_nothing(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tree / "room/core.py").write_text(SOURCE.replace("2 * x", "4 * x"))
    assert try_all([mutant("4 * x", "3 * x")], tree, copies=1) == 1
    assert "fail as the tree is" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (mutant("4 * x", "3 * x"), "the text is there 0 times, not once"),
        (mutant("x", "y"), "the text is there 4 times, not once"),
        (mutant("2 * x", "2 *"), "not Python any more"),
        (mutant("2 * x", "2 * x"), "nothing changes"),
        (mutant("2 * x", "3 * x", "test_triple"), "no test tests/test_core.py::test_triple"),
    ],
)
def test_entry_that_no_longer_fits_the_tree_is_an_error_of_the_list(
    tree: Path, wrong: Mutant, says: str
) -> None:
    assert any(says in problem for problem in problems([wrong], tree))
