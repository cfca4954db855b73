"""A store with wrong records, missing files and a failing disk: one kind of error, and nothing half made."""

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import CorruptArtifact, StoreError
from pipeline.store.artifact import RECORD_FILE, _self_digest, read_record
from pipeline.store.local import Store
from tests.faults.corpus_files import records
from tests.faults.fuzz import seeded
from tests.pipeline.store_toys import CONTENT, put

SEEDED = seeded(250)
pytestmark = pytest.mark.usefixtures("no_disk_sync")


@pytest.fixture
def empty(tmp_path: Path) -> Store:
    made = Store(tmp_path / "store")
    made.prepare()
    return made


# --- records that lie ----------------------------------------------------------------------------------------------------

names = st.sampled_from(
    ["", ".", "..", "/etc/passwd", "../x", "a/../b", "a//b", "./a", "a\0b", "\ud800", "n" * 5000]
)
values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False, allow_infinity=False),
        st.text(max_size=8), names,
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | names, inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@st.composite
def changed(draw: st.DrawFn, tree: Any) -> Any:
    """A copy of a tree in which one value is changed, removed, or joined by another."""
    if isinstance(tree, dict) and tree and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(sorted(tree)))
        what = draw(st.sampled_from(["below", "below", "gone", "more"]))
        if what == "gone":
            return {name: value for name, value in tree.items() if name != key}
        if what == "more":
            return tree | {draw(st.text(max_size=8) | names): draw(values)}
        return tree | {key: draw(changed(tree[key]))}
    return draw(values)


def use(store: Store, kind: str, fingerprint: str) -> None:
    """All operations of a run on an artifact that it finds."""
    store.verify()
    store.has(kind, fingerprint)
    record = store.record(kind, fingerprint)
    if record is not None:
        assert record.bytes >= 0 and len(record.digest) == 64
        store.open_verified(record)


@pytest.mark.fault("F15")
def test_record_changed_in_any_value_is_refused_or_still_true(
    empty: Store, record_property: Callable[[str, object], None]
) -> None:
    made = put(empty)
    path = made.path / RECORD_FILE
    whole = json.loads(path.read_text())
    outside = sorted(made.path.parent.parent.iterdir())
    seen = []

    @SEEDED
    @given(
        body=changed({key: value for key, value in whole.items() if key != "record_sha256"}),
        honest=st.booleans(),
    )
    def check(body: Any, honest: bool) -> None:
        path.parent.mkdir(exist_ok=True)
        for name, data in CONTENT.items():
            (path.parent / name).write_bytes(data)
        if honest and isinstance(body, dict):  # its digest is right
            body = body | {"record_sha256": _self_digest(body)}
        path.write_text(json.dumps(body))
        began = time.perf_counter()
        with contextlib.suppress(StoreError):
            use(empty, "train", made.fingerprint)
        seen.append(time.perf_counter() - began)

    check()
    assert [path for path in sorted(empty.root.iterdir()) if path not in outside] in (
        [],
        [empty.root / ".corrupt"],
    )
    assert max(seen) < 5
    record_property("cases", len(seen))
    record_property("slowest record", f"{max(seen):.3f} s")


@pytest.mark.fault("F15")
def test_record_of_the_corpus_is_refused_by_its_path(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    for source in records():
        home = tmp_path / source.stem
        home.mkdir()
        (home / RECORD_FILE).write_bytes(source.read_bytes())
        with pytest.raises(CorruptArtifact) as caught:
            read_record(home)
        assert str(home / RECORD_FILE) in str(caught.value) and len(str(caught.value)) < 2000, source.name
        str(caught.value).encode()
    record_property("cases", len(records()))


@pytest.mark.fault("F15")
@pytest.mark.parametrize("kind", ["pipe", "link to an endless file", "folder"])
def test_record_that_is_no_regular_file_is_refused_without_waiting_for_it(empty: Store, kind: str) -> None:
    made = put(empty)
    path = made.path / RECORD_FILE
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    assert empty.record("train", made.fingerprint) is None
    assert any(str(path) in problem for problem in empty.verify())
    assert put(empty).files == made.files
    assert empty.verify() == []
