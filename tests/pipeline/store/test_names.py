"""The index of artifacts: stores of older versions, lost entries, and other processes at any moment."""

import os
import shutil
from pathlib import Path

import pytest

from pipeline.store import names as store_names
from pipeline.store.local import Store
from pipeline.store.names import Names
from tests.pipeline.store_toys import ToyStep, numbered, put


@pytest.fixture
def empty(tmp_path: Path) -> Store:
    made = Store(tmp_path / "store")
    made.prepare()
    return made


def count_scans(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    scans: list[Path] = []
    real = Names._scan

    def counted(names: Names) -> dict[str, str]:
        scans.append(names.root)
        return real(names)

    monkeypatch.setattr(Names, "_scan", counted)
    return scans


def test_no_look_up_and_no_commit_reads_the_other_artifacts(
    empty: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(5):
        put(empty, numbered(number))
    monkeypatch.setattr(Path, "iterdir", lambda path: pytest.fail(f"listed {path}"))
    monkeypatch.setattr(os, "listdir", lambda path: pytest.fail(f"listed {path}"))
    made = empty.find(numbered(3).fingerprint)
    assert made is not None and empty.has("train", made.fingerprint)
    assert not empty.has("train", numbered(99).fingerprint)
    assert empty.path("train", made.fingerprint, "other") == made.path
    assert Names(empty.root).claim("train", "0" * 16, "new") == empty.root / "train" / f"new-{'0' * 16}"


def test_store_of_an_older_version_reads_the_same_before_and_after_its_next_run(
    empty: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [put(empty, numbered(number)) for number in range(4)]
    shutil.rmtree(empty.root / ".names")
    scans = count_scans(monkeypatch)
    assert [empty.find(record.fingerprint) for record in records] == records
    assert len(scans) == 1 and not (empty.root / ".names").exists()
    empty.prepare()
    assert len(list((empty.root / ".names").iterdir())) == 4
    assert [empty.find(record.fingerprint) for record in records] == records
    assert put(empty, ToyStep(spec={"number": 2}, slug="other")) == records[2]


def test_commit_into_a_store_of_an_older_version_names_all_that_is_there(empty: Store) -> None:
    records = [put(empty, numbered(number)) for number in range(3)]
    shutil.rmtree(empty.root / ".names")
    new = put(empty, numbered(9))
    assert [empty.find(record.fingerprint) for record in [*records, new]] == [*records, new]


@pytest.mark.fault("F15")
@pytest.mark.parametrize("content", ["", "train", "../../etc", "train/x/../y", "merge/else-0000000000000000"])
def test_damaged_name_does_not_hide_or_divert_an_artifact(empty: Store, content: str) -> None:
    record = put(empty)
    name = empty.root / ".names" / record.fingerprint[:16]
    name.write_text(content)
    assert empty.find(record.fingerprint) == record
    assert put(empty, ToyStep(slug="other")) == record
    name.unlink()
    empty.prepare()
    assert empty.find(record.fingerprint) == record


@pytest.mark.fault("F33")
def test_name_whose_artifact_was_removed_is_no_artifact_and_is_used_again(empty: Store) -> None:
    record = put(empty)
    shutil.rmtree(record.path)
    assert empty.find(record.fingerprint) is None and not empty.has("train", record.fingerprint)
    again = put(empty, ToyStep(slug="t9-other"))
    assert again.path == record.path and empty.verify() == []


def test_two_writers_at_the_same_moment_agree_on_the_directory_of_the_first(
    empty: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second writer has found no entry and prepared one when the first publishes its own: no lock or earlier check helps."""
    write, chosen = store_names._write, list[Path]()

    def overtaken(path: Path, text: str) -> None:
        write(path, text)
        if not chosen:
            monkeypatch.setattr(store_names, "_write", write)
            chosen.append(Names(empty.root).claim("train", "a" * 16, "one"))

    monkeypatch.setattr(store_names, "_write", overtaken)
    chosen.append(Names(empty.root).claim("train", "a" * 16, "two"))
    assert chosen == [empty.root / "train" / f"one-{'a' * 16}"] * 2
    assert (empty.root / ".names" / ("a" * 16)).read_text() == f"train/one-{'a' * 16}"


def test_two_writers_without_locks_or_links_agree_on_one_directory(
    empty: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Names(empty.root).claim("train", "a" * 16, "one")
    assert Names(empty.root).claim("train", "a" * 16, "two") == first

    def no_links(*_: object) -> None:
        raise PermissionError(1, "not permitted")

    monkeypatch.setattr(store_names.os, "link", no_links)
    assert Names(empty.root).claim("train", "b" * 16, "one").name == f"one-{'b' * 16}"
    assert list((empty.root / ".stage").iterdir()) == []
