"""Label sets mean something, and a registered one is found by every process."""

from pathlib import Path

import pytest

from workers.serving import labels
from workers.serving.labels import LabelError, LabelSet, LabelSets


@pytest.mark.parametrize(
    ("names", "templates"),
    [((), ("a {c}",)), (("a",), ()), (("a", "b", "a"), ("a {c}",)), (("a",), ("a {c}", "no place"))],
)
def test_labels_that_classify_nothing_are_refused(names: tuple[str, ...], templates: tuple[str, ...]) -> None:
    with pytest.raises(LabelError):
        LabelSet(names, templates)


def test_registered_set_is_found_by_others_replaced_and_removed(tmp_path: Path) -> None:
    mine, theirs = LabelSets(tmp_path), LabelSets(tmp_path)
    assert theirs.get("pets") is None
    assert mine.put("pets", LabelSet(("cat", "dog"))) is True
    found = theirs.get("pets")
    assert found == LabelSet(("cat", "dog")) and found.digest == LabelSet(("cat", "dog")).digest
    assert mine.put("pets", LabelSet(("cat", "dog", "bird"), ("a {c}",))) is False
    assert theirs.get("pets") == LabelSet(("cat", "dog", "bird"), ("a {c}",))
    assert theirs.names() == ["pets"] and len(theirs.every()) == 1
    assert theirs.remove("pets") and mine.get("pets") is None and not mine.remove("pets")


@pytest.mark.parametrize("name", ["../evil", "", ".", "..", "a/b", "a" * 65, "ä", ".hidden", "a\n"])
def test_name_that_is_no_plain_file_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(LabelError):
        LabelSets(tmp_path).put(name, LabelSet(("a",)))


def test_one_set_too_many_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels, "MOST", 1)
    sets = LabelSets(tmp_path)
    sets.put("one", LabelSet(("a",)))
    with pytest.raises(LabelError):
        sets.put("two", LabelSet(("a",)))
    assert sets.put("one", LabelSet(("b",))) is False


def test_digest_tells_order_and_templates_apart() -> None:
    one = LabelSet(("a", "b"), ("x {c}",))
    assert (
        len({one.digest, LabelSet(("b", "a"), ("x {c}",)).digest, LabelSet(("a", "b"), ("y {c}",)).digest})
        == 3
    )
