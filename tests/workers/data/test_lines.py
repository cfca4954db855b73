"""A class is a line number, so lines are split as the writer of the file meant them."""

from pathlib import Path

import pytest

from merge_service.errors import UserError
from tests.workers.data.test_manifest import foreign, write
from workers.data.lines import class_names, filled_lines, read_lines, stated_number
from workers.data.manifest import describe


@pytest.mark.parametrize(
    "data",
    [
        b"ant\nbee\ncow\n", b"ant\nbee\ncow", b"\xef\xbb\xbfant\nbee\ncow\n", b"ant\r\nbee\r\ncow\r\n", b"ant\rbee\rcow",
        b" ant\t\nbee \ncow\n\n \n",
    ],
)  # fmt: skip
def test_lines_of_every_writer_are_the_same_names(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "names.txt").write_bytes(data)
    assert class_names(tmp_path / "names.txt") == ("ant", "bee", "cow")


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e"])
def test_mark_that_python_takes_for_a_line_end_stays_in_its_name(tmp_path: Path, mark: str) -> None:
    (tmp_path / "names.txt").write_bytes(f"ant{mark}hill\nbee\n".encode())
    assert class_names(tmp_path / "names.txt") == (f"ant{mark}hill", "bee")


@pytest.mark.parametrize("data", [b"\nant\n", b"ant\n\nbee\n", b"ant\r\n \t\r\nbee"])
def test_blank_line_among_classes_is_refused_by_its_number(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "names.txt").write_bytes(data)
    number = 1 if data.startswith(b"\n") else 2
    with pytest.raises(UserError, match=rf"names\.txt, line {number} is blank.*label {number - 1}"):
        class_names(tmp_path / "names.txt")
    assert "" in read_lines(tmp_path / "names.txt") and "" not in filled_lines(tmp_path / "names.txt")


@pytest.mark.parametrize(
    ("data", "says"),
    [(b"ant\nb\xe9e\n", "line 2: byte 0xe9"), ("ant\n".encode("utf-16"), "line 1"), ("ant".encode("utf-16-le"), "NUL")],
)  # fmt: skip
def test_text_that_is_not_utf8_is_refused_by_its_line(tmp_path: Path, data: bytes, says: str) -> None:
    (tmp_path / "names.txt").write_bytes(data)
    with pytest.raises(UserError, match=says):
        class_names(tmp_path / "names.txt")


def test_all_files_of_a_dataset_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    home = write(tmp_path)
    plain = describe(tmp_path, "toys", tmp_path / "cache")
    foreign(home)
    for path in (
        home / "classnames.txt",
        home / "zeroshot_classification_templates.txt",
        home / "dataset_type.txt",
    ):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    for split in ("train", "test"):
        (home / split / "nshards.txt").write_bytes(
            b"\xef\xbb\xbf" + (home / split / "nshards.txt").read_bytes()
        )
    assert describe(tmp_path, "toys", tmp_path / "cache") == plain


def test_number_of_shards_is_a_number(tmp_path: Path) -> None:
    path = tmp_path / "nshards.txt"
    for data, number in (("3", 3), ("03\n", 3), ("", None), ("\n", None)):
        path.write_text(data)
        assert stated_number(path) == number
    path.write_text("three")
    with pytest.raises(UserError, match="must hold the number of shards"):
        stated_number(path)
