"""A store that is not writable, loses files while they are read, or has a failing disk call.

The error names the path, nothing half made is left, and the same step then succeeds.
"""

import contextlib
import errno
import os
import pickle
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from merge_service.errors import UserError
from pipeline.errors import CorruptArtifact, StorageFull, StoreError, StoreUnwritable
from pipeline.store.local import Store
from tests.pipeline.store_toys import CONTENT, ToyStep, put

NOBODY = 65534
pytestmark = pytest.mark.fault("F33")


@pytest.fixture
def empty(tmp_path: Path) -> Store:
    made = Store(tmp_path / "store")
    made.prepare()
    return made


@contextlib.contextmanager
def as_nobody() -> Iterator[Path]:
    """A folder of a user other than root, for whom permissions apply."""
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as place:
        with tempfile.TemporaryDirectory() as other:
            put(Store(Path(other)))  # import what a commit needs while all of it is readable
        if root:
            os.chown(place, NOBODY, NOBODY)
            os.seteuid(NOBODY)
        try:
            yield Path(place)
        finally:
            if root:
                os.seteuid(0)
            for folder, _, _ in os.walk(place):
                Path(folder).chmod(0o700)


def tree(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.name != ".lock")


@pytest.mark.parametrize("closed", [".", ".stage", "train", ".names"])
def test_folder_without_write_permission_is_named_and_the_step_goes_through_when_it_is_given(
    closed: str,
) -> None:
    with as_nobody() as place:
        store = Store(place / "store")
        store.prepare()
        before = tree(store.root)
        (store.root / closed).chmod(0o500)
        if closed == ".":
            for folder in before:
                (store.root / folder).chmod(0o500)
        with pytest.raises(StoreUnwritable, match=str(store.root)) as caught:
            put(store)
        assert isinstance(caught.value, UserError) and "Permission denied" in str(caught.value)
        for folder in (".", *before):
            (store.root / folder).chmod(0o700)
        assert [path for path in tree(store.root) if not path.startswith(".names/")] == before
        assert not store.has("train", ToyStep().fingerprint)
        made = put(store)
        assert store.open_verified(made) and store.verify() == []


@pytest.mark.parametrize("name", ["record.json", "weights.bin"])
def test_file_without_read_permission_is_told_by_its_path_and_made_anew(name: str) -> None:
    with as_nobody() as place:
        store = Store(place / "store")
        store.prepare()
        made = put(store)
        (made.path / name).chmod(0)
        assert any(
            str(made.path / name) in problem and "Permission denied" in problem for problem in store.verify()
        )
        if name == "record.json":
            assert store.record("train", made.fingerprint) is None
        else:
            with pytest.raises(CorruptArtifact, match=r"weights\.bin cannot be read: Permission denied"):
                store.open_verified(made)
        assert put(store).files == made.files
        assert store.verify() == []


def test_store_that_may_only_be_read_is_read(tmp_path: Path) -> None:
    with as_nobody() as place:
        store = Store(place / "store")
        store.prepare()
        made = put(store)
        for path in sorted(store.root.rglob("*"), reverse=True):
            path.chmod(0o500 if path.is_dir() else 0o400)
        store.root.chmod(0o500)
        record = Store(store.root).find(made.fingerprint)
        assert record == made and store.open_verified(record) == made.path and store.verify() == []


VANISH = {
    "a file": lambda path: (path / "weights.bin").unlink(),
    "the record": lambda path: (path / "record.json").unlink(),
    "the folder": lambda path: [*(file.unlink() for file in path.iterdir()), path.rmdir()],
}


@pytest.mark.parametrize("what", VANISH)
def test_artifact_deleted_under_a_reader_is_an_error_with_its_path_and_can_be_made_again(
    empty: Store, what: str
) -> None:
    made = put(empty)
    consumer = ToyStep("merge", inputs={"t1": made.fingerprint})
    VANISH[what](made.path)
    with pytest.raises(CorruptArtifact) as caught:
        empty.open_inputs(consumer)
    assert str(empty.root) in str(caught.value) and "run again" in str(caught.value)
    again = put(empty)
    assert again.files == made.files
    assert empty.open_inputs(consumer) == {"t1": again.path}
    assert empty.verify() == []


@pytest.mark.parametrize("moment", ["while it is written", "before it is committed"])
def test_stage_deleted_under_a_writer_leaves_nothing_and_the_step_can_be_done_again(
    empty: Store, moment: str
) -> None:
    step = ToyStep()
    with pytest.raises((StoreError, FileNotFoundError)) as caught, empty.staged(step) as stage:
        (stage / "weights.bin").write_bytes(b"x")
        for file in stage.iterdir():
            file.unlink()
        stage.rmdir()
        if moment == "while it is written":
            (stage / "config.json").write_bytes(b"x")
        empty.commit(step, stage, {}, seconds=0)
    assert str(stage.parent.parent) in str(caught.value)
    assert not empty.has("train", step.fingerprint) and not tree(empty.root / "train")
    put(empty)
    assert empty.verify() == []


CALLS = {
    "os.fsync": (os, "fsync"), "os.link": (os, "link"), "os.open": (os, "open"), "os.stat": (os, "stat"),
    "Path.rename": (Path, "rename"), "Path.open": (Path, "open"), "Path.mkdir": (Path, "mkdir"),
}  # fmt: skip
CODES = {
    "EIO": (errno.EIO, StoreError), "EROFS": (errno.EROFS, StoreUnwritable), "EACCES": (errno.EACCES, StoreUnwritable),
    "ENOSPC": (errno.ENOSPC, StorageFull), "EDQUOT": (errno.EDQUOT, StorageFull), "ESTALE": (errno.ESTALE, StoreError),
    "EXDEV": (errno.EXDEV, StoreError), "EBUSY": (errno.EBUSY, StoreError),
}  # fmt: skip


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("call", CALLS)
def test_call_of_the_disk_that_fails_at_any_turn_is_one_of_our_errors_and_leaves_nothing(
    empty: Store, call: str, code: str, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    """The first such call of a commit fails, then the second, and so on, until a commit has no call left to fail."""
    owner, name = CALLS[call]
    number, kind = CODES[code]
    kind = StoreError if call in ("os.open", "os.stat") else kind  # an unreadable file may still be writable
    original = getattr(owner, name)
    failed = 0
    for turn in range(40):
        left = [turn]
        step = ToyStep(spec={"turn": turn})

        def failing(*arguments: Any, left: list[int] = left, **options: Any) -> Any:
            left[0] -= 1
            if left[0] == -1:
                raise OSError(number, os.strerror(number), str(empty.root))
            return original(*arguments, **options)

        with empty.staged(step) as stage:
            for file, data in CONTENT.items():
                (stage / file).write_bytes(data)
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, failing)
                try:
                    empty.commit(step, stage, {}, seconds=0)
                    error = None
                except StoreError as caught:
                    error = caught
        fired = left[0] < 0
        failed += fired
        if error is not None:
            assert fired and isinstance(error, kind) and str(empty.root) in str(error), repr(error)
            assert str(pickle.loads(pickle.dumps(error))) == str(error)
        assert tree(empty.root / ".stage") == []
        assert empty.verify() == []
        put(empty, step)
        assert empty.open_verified(empty.find(step.fingerprint)) and empty.verify() == []
        if not fired:
            break
    assert not fired, "a commit of two files needs no forty calls"
    assert failed, f"a commit never calls {call}"
    record_property("cases", failed)
