"""Damage and full disks: every byte is checked, and nothing half done is left."""

import errno
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from merge_service.errors import UserError
from pipeline.errors import CorruptArtifact, StorageFull, StoreError, StoreUnwritable
from pipeline.kinds.table import KINDS
from pipeline.store import local as store
from pipeline.store.artifact import RECORD_FILE
from pipeline.store.local import Store
from tests.pipeline.store_toys import ToyStep, child, put


def everything(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.name != ".lock")


@pytest.fixture
def empty(tmp_path: Path) -> Store:
    made = Store(tmp_path / "store")
    made.prepare()
    return made


def damage_flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def damage_truncate(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def damage_trail(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes() + rng.randbytes(1 + rng.randrange(64)))


def damage_zero(path: Path, rng: random.Random) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def damage_remove(path: Path, rng: random.Random) -> None:
    path.unlink()


DAMAGES = {damage_flip: 64, damage_truncate: 64, damage_trail: 4, damage_zero: 1, damage_remove: 1}


@pytest.mark.fault("F15")
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_file_is_found_on_read_set_aside_and_can_be_made_anew(
    empty: Store, damage: Any, record_property: Callable[[str, object], None]
) -> None:
    record_property("cases", DAMAGES[damage])
    rng = random.Random(1)
    for _ in range(DAMAGES[damage]):
        made = put(empty)
        damage(made.path / "weights.bin", rng)
        assert len(empty.verify()) == 1
        with pytest.raises(CorruptArtifact, match=r"weights\.bin"):
            empty.open_verified(made)
        assert not empty.has("train", made.fingerprint)
        with pytest.raises(CorruptArtifact):
            empty.open_verified(made)
    assert len(list((empty.root / ".corrupt").iterdir())) == DAMAGES[damage]
    assert empty.open_verified(put(empty)).is_dir()
    assert empty.verify() == []


@pytest.mark.fault("F15")
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_record_is_no_record_and_is_replaced_by_the_next_commit(
    empty: Store, damage: Any, record_property: Callable[[str, object], None]
) -> None:
    record_property("cases", DAMAGES[damage] // 2 + 1)
    rng = random.Random(2)
    for _ in range(DAMAGES[damage] // 2 + 1):
        made = put(empty)
        damage(made.path / RECORD_FILE, rng)
        assert empty.record("train", made.fingerprint) is None
        assert made.path.is_dir(), "looking must not change the store"
        assert any(str(made.path) in problem for problem in empty.verify())
    assert put(empty).result == {"loss": 0.5}
    assert empty.verify() == []


@pytest.mark.fault("F15")
def test_file_once_verified_is_read_again_when_its_stat_changes(empty: Store) -> None:
    made = put(empty)
    path = made.path / "weights.bin"
    empty.open_verified(made)
    times = path.stat()
    damage_flip(path, random.Random(3))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(CorruptArtifact):
        empty.open_verified(made)


def test_file_once_verified_is_not_read_again(empty: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    made = put(empty)
    empty.open_verified(made)
    monkeypatch.setattr(store, "difference", lambda *_: pytest.fail("read again"))
    empty.open_verified(made)


@pytest.mark.fault("F15")
def test_record_of_another_step_does_not_stand_for_this_one(empty: Store) -> None:
    one, two = put(empty), put(empty, ToyStep(spec={"toy": 2}), {"weights.bin": b"two"})
    shutil.copy(two.path / RECORD_FILE, one.path / RECORD_FILE)
    assert empty.record("train", one.fingerprint) is None
    assert any(str(one.path) in problem for problem in empty.verify())


@pytest.mark.fault("F15")
def test_record_cannot_reach_outside_its_artifact(empty: Store, tmp_path: Path) -> None:
    made = put(empty)
    body = json.loads((made.path / RECORD_FILE).read_text())
    body["files"] = {"../../../secret": {"sha256": "0" * 64, "bytes": 1}}
    del body["record_sha256"]
    body["record_sha256"] = store.read_record.__globals__["_self_digest"](body)
    (made.path / RECORD_FILE).write_text(json.dumps(body))
    assert empty.record("train", made.fingerprint) is None
    assert "secret" in empty.verify()[0]


@pytest.mark.fault("F15")
def test_audit_names_every_kind_of_problem_with_its_path(empty: Store) -> None:
    source = put(empty)
    merged = put(empty, ToyStep("merge", inputs={"t1": source.fingerprint}))
    (merged.path / "extra").write_text("x")
    assert [str(merged.path / "extra") in problem for problem in empty.verify()] == [True]
    (merged.path / "extra").unlink()
    moved = merged.path.with_name("renamed-" + "0" * 16)
    merged.path.rename(moved)
    assert any("not named after" in problem for problem in empty.verify())
    moved.rename(merged.path)
    stray = empty.root / "merge" / "note.txt"
    stray.write_text("x")
    assert empty.verify() == [f"{stray} does not belong in a store"]
    stray.unlink()
    shutil.rmtree(source.path)
    assert any("its input t1" in problem for problem in empty.verify())
    put(empty, content={"weights.bin": b"made again otherwise"})
    assert any("other bytes now" in problem for problem in empty.verify())


def test_audit_is_quiet_while_another_process_writes(empty: Store) -> None:
    process = child("put_many", empty.root, 60)
    ended = False
    while not ended:
        ended = process.poll() is not None
        assert empty.verify() == []
    assert len(list(empty.records("train"))) == 60


# --- disks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.fault("F14")
def test_step_that_does_not_fit_is_refused_before_it_begins(empty: Store) -> None:
    with pytest.raises(StorageFull, match="needed") as caught, empty.staged(ToyStep(disk_bytes=10**18)):
        pytest.fail("began")
    assert caught.value.needed == 10**18
    assert 0 < caught.value.free < 10**18
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.needed, str(again)) == (10**18, str(caught.value))


@pytest.mark.fault("F14")
def test_room_for_a_whole_plan_can_be_asked_for(empty: Store) -> None:
    empty.check_room("study toy", 1)
    with pytest.raises(StorageFull, match="study toy"):
        empty.check_room("study toy", 10**18)


@pytest.mark.fault("F14")
def test_disk_that_runs_full_while_writing_is_named_and_leaves_nothing(empty: Store) -> None:
    first = put(empty, ToyStep(spec={"first": 1}))
    with pytest.raises(StorageFull, match="t1 toy: expert"), empty.staged(ToyStep(disk_bytes=5)) as stage:
        (stage / "weights.bin").write_bytes(b"some")
        with Path("/dev/full").open("wb", buffering=0) as full:
            full.write(b"x")
    assert list((empty.root / ".stage").iterdir()) == []
    assert empty.open_verified(first)
    put(empty)
    assert empty.verify() == []


@pytest.mark.fault("F14")
def test_full_disk_is_recognised_in_what_other_libraries_raise(empty: Store) -> None:
    with pytest.raises(StorageFull), empty.staged(ToyStep()):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.fault("F33", "F14")
@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_full_or_failing_disk_at_commit_leaves_nothing(
    empty: Store, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(code: int) -> Any:
        def failing(*_: Any, **__: Any) -> None:
            raise OSError(code, os.strerror(code))

        return failing

    for code, expected in ((errno.ENOSPC, StorageFull), (errno.EIO, StoreError)):
        with monkeypatch.context() as patch, pytest.raises(expected):
            patch.setattr(os if call == "fsync" else Path, call, fail(code))
            put(empty)
        left = [name for name in everything(empty.root) if not name.startswith(".names")]
        assert left == sorted([".stage", *KINDS])
        assert not empty.has("train", ToyStep().fingerprint)
    put(empty)
    assert empty.verify() == []


@pytest.mark.fault("F33")
def test_place_that_cannot_be_a_store_is_the_users_to_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreUnwritable, match="--out") as caught:
        Store(tmp_path / "file" / "store").prepare()
    assert isinstance(caught.value, UserError)

    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "mkdir", read_only)
    with pytest.raises(StoreUnwritable, match=str(tmp_path / "ro")):
        Store(tmp_path / "ro").prepare()
    with pytest.raises(StoreUnwritable), Store(tmp_path / "ro").staged(ToyStep()):
        pytest.fail("began")


@pytest.mark.fault("F33")
def test_damage_in_a_store_that_cannot_be_written_is_still_told(
    empty: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = put(empty)
    (made.path / "weights.bin").write_bytes(b"x")

    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "rename", read_only)
    with pytest.raises(CorruptArtifact, match=r"weights\.bin .* could not be moved aside"):
        empty.open_verified(made)
