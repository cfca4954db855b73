"""The store: all or nothing whichever process ends when, one result per step, and every byte checked."""

import os
import pickle
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import CorruptArtifact, NondeterminismError, StoreError
from pipeline.files import ownership
from pipeline.store.artifact import RECORD_FILE
from pipeline.store.local import Store
from tests.pipeline.store_toys import CONTENT, ToyStep, child, exit_code, numbered, put

POINTS = ("store.after_stage", "store.after_fsync", "store.before_record", "store.after_rename")


def everything(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.name != ".lock")


@pytest.fixture
def empty(tmp_path: Path) -> Store:
    made = Store(tmp_path / "store")
    made.prepare()
    return made


# --- committing and reading ----------------------------------------------------------------------------------------------


def test_committed_artifact_is_found_with_all_that_was_said_about_it(empty: Store) -> None:
    step = ToyStep(inputs={"init": "f" * 64})
    before = time.time_ns() // 1_000_000
    made = put(empty, step, result={"loss": 0.25, "curve": [[1, 2.0]]})
    found = empty.record("train", step.fingerprint)
    assert found == made
    assert found is not None
    assert found.result == {"loss": 0.25, "curve": [[1, 2.0]]}
    assert (found.slug, found.seconds, found.spec, found.inputs) == (step.slug, 1.5, step.spec, step.inputs)
    assert before <= found.created_ms <= time.time_ns() // 1_000_000
    assert set(found.files) == set(CONTENT)
    assert found.bytes == sum(map(len, CONTENT.values()))
    assert found.path.name == f"t1-toy-{step.fingerprint[:16]}"
    assert "python" in found.versions
    assert empty.open_verified(found) == found.path
    assert empty.has("train", step.fingerprint)
    assert empty.path("train", step.fingerprint, "whatever") == found.path
    assert empty.find(step.fingerprint) == found
    assert list(empty.records("train")) == [found]
    assert empty.verify() == [f"{found.path}: its input init (ffffffffffffffff) is not in the store"]


def test_nothing_is_found_where_nothing_was_committed(tmp_path: Path) -> None:
    nowhere = Store(tmp_path / "none")
    assert nowhere.record("train", "a" * 64) is None
    assert not nowhere.has("merge", "a" * 64)
    assert nowhere.find("a" * 64) is None
    assert list(nowhere.records("train")) == []
    assert nowhere.path("train", "a" * 64, "slug") == tmp_path / "none/train" / f"slug-{'a' * 16}"
    assert len(nowhere.verify()) == 1
    assert not (tmp_path / "none").exists()


def test_store_travels_between_processes_as_its_path(empty: Store) -> None:
    put(empty)
    again = pickle.loads(pickle.dumps(empty))
    assert again == empty
    assert again.has("train", ToyStep().fingerprint)


def test_other_process_sees_what_was_committed_a_moment_ago(empty: Store) -> None:
    process = child("put_many", empty.root, 20)
    for number in range(20):
        step = numbered(number)
        deadline = time.monotonic() + 30
        while not (empty.root / "train" / f"t1-toy-{step.fingerprint[:16]}").exists():
            assert time.monotonic() < deadline
            empty.has("train", step.fingerprint)
        assert empty.has("train", step.fingerprint)
        assert empty.record("train", step.fingerprint) is not None
    assert process.wait(60) == 0


def test_same_bytes_again_change_nothing(empty: Store) -> None:
    first = put(empty)
    second = put(empty, result={"loss": 99.0})
    assert second == first
    assert everything(empty.root / "train") == everything(empty.root / "train")
    assert len(list((empty.root / "train").iterdir())) == 1
    assert list((empty.root / ".stage").iterdir()) == []


def test_same_step_under_another_slug_is_the_same_artifact(empty: Store) -> None:
    first = put(empty)
    assert put(empty, ToyStep(slug="t7-elsewhere")) == first
    assert len(list((empty.root / "train").iterdir())) == 1


def test_other_bytes_are_an_error_that_keeps_both(empty: Store) -> None:
    first = put(empty)
    with pytest.raises(NondeterminismError, match=r"weights\.bin") as caught:
        put(empty, content={**CONTENT, "weights.bin": b"other"})
    assert Path(caught.value.first) == first.path
    assert (Path(caught.value.second) / "weights.bin").read_bytes() == b"other"
    assert (first.path / "weights.bin").read_bytes() == CONTENT["weights.bin"]
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert empty.verify() == []


def test_step_with_the_same_first_digits_as_another_is_refused_and_neither_is_taken_for_the_other(
    empty: Store,
) -> None:
    class Namesake(ToyStep):
        fingerprint = ToyStep().fingerprint[:16] + "0" * 48

    first = put(empty)
    assert not empty.has("train", Namesake.fingerprint)
    with pytest.raises(StoreError, match="another step with the same first 16 digits"):
        put(empty, Namesake())
    assert empty.record("train", first.fingerprint) == first and empty.verify() == []


def test_other_scores_are_other_results_though_there_are_no_files(empty: Store) -> None:
    step = ToyStep("evaluate")
    first = put(empty, step, {}, {"scores": {"a": 0.5}, "seconds": 1.0})
    assert put(empty, step, {}, {"scores": {"a": 0.5}, "seconds": 2.0}) == first
    with pytest.raises(NondeterminismError, match="scores"):
        put(empty, step, {}, {"scores": {"a": 0.6}})


def test_uncommitted_stage_is_removed_with_its_block(empty: Store) -> None:
    with pytest.raises(RuntimeError), empty.staged(ToyStep()) as stage:
        (stage / "half").write_bytes(b"x")
        raise RuntimeError
    assert list((empty.root / ".stage").iterdir()) == []
    with empty.staged() as stage:
        assert stage.is_dir()
    assert not stage.exists()


@pytest.mark.parametrize("result", [{"loss": float("nan")}, {"x": {1, 2}}, {"x": object()}])
def test_result_that_is_not_plain_is_refused_before_it_is_kept(empty: Store, result: dict[str, Any]) -> None:
    with pytest.raises(StoreError, match="not plain JSON"):
        put(empty, result=result)
    assert not empty.has("train", ToyStep().fingerprint)


@pytest.mark.fault("F15")
def test_links_do_not_enter_the_store(empty: Store, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    with pytest.raises(StoreError, match="regular"), empty.staged(ToyStep()) as stage:
        (stage / "link").symlink_to(tmp_path / "secret")
        empty.commit(ToyStep(), stage, {}, seconds=0)


@pytest.mark.parametrize("slug", ["", "a/b", "../x", ".hidden", "a\0b"])
def test_slug_that_is_no_path_segment_is_refused(empty: Store, slug: str) -> None:
    with pytest.raises(ValueError):
        put(empty, ToyStep(slug=slug))


def test_files_in_folders_are_part_of_the_artifact(empty: Store) -> None:
    made = put(empty, content={"tokenizer/vocab.txt": b"a b", "weights.bin": b"x"})
    assert set(made.files) == {"tokenizer/vocab.txt", "weights.bin"}
    (made.path / "tokenizer/vocab.txt").write_bytes(b"a c")
    assert len(empty.verify()) == 1


def test_digest_of_inputs_is_kept_with_what_was_made_of_them(empty: Store) -> None:
    source = put(empty)
    step = ToyStep("merge", inputs={"t1": source.fingerprint})
    made = put(empty, step)
    assert made.input_digests == {"t1": source.digest}
    assert empty.open_inputs(step) == {"t1": source.path}
    assert empty.verify() == []


@pytest.mark.fault("F15")
def test_missing_input_is_named(empty: Store) -> None:
    with pytest.raises(CorruptArtifact, match="t1"):
        empty.open_inputs(ToyStep("merge", inputs={"t1": "a" * 64}))


@pytest.mark.fault("F15")
def test_step_with_a_damaged_record_counts_as_not_done(empty: Store) -> None:
    made = put(empty)
    assert empty.has("train", made.fingerprint)
    assert empty.has("train", made.fingerprint)
    (made.path / RECORD_FILE).write_text("{}")
    assert not empty.has("train", made.fingerprint)
    (made.path / RECORD_FILE).unlink()
    assert not empty.has("train", made.fingerprint)


# --- crashes -------------------------------------------------------------------------------------------------------------


@pytest.mark.fault("F2")
@pytest.mark.parametrize("point", POINTS)
def test_death_at_any_point_leaves_nothing_or_the_whole_and_a_second_run_completes(
    empty: Store, point: str
) -> None:
    marker = empty.root.with_name("fired")
    code = exit_code("put_one", empty.root, faults={point: {"marker": str(marker)}})
    assert marker.exists(), "the fault was not placed on the way"
    assert code == -signal.SIGKILL
    there = empty.record("train", ToyStep().fingerprint)
    assert (there is not None) == (point == "store.after_rename")
    assert empty.verify() == []
    assert len(list((empty.root / ".stage").iterdir())) == (0 if there else 1)
    empty.prepare()
    assert list((empty.root / ".stage").iterdir()) == []
    again = put(empty)
    assert {name: entry["sha256"] for name, entry in again.files.items()} == {
        name: entry["sha256"] for name, entry in put(Store(empty.root.with_name("undisturbed"))).files.items()
    }
    assert empty.verify() == []


@pytest.mark.fault("F2")
def test_kill_in_the_middle_of_writing_leaves_nothing(empty: Store) -> None:
    assert exit_code("die_while_writing", empty.root) == -signal.SIGKILL
    assert empty.verify() == []
    assert len(empty.sweep()) == 1


@pytest.mark.fault("F32")
def test_sweep_spares_the_living_and_the_young_of_other_hosts(empty: Store) -> None:
    room = empty.root / ".stage"
    foreign, stale = room / "train-x.0123456789ab-1-1.aaaa", room / "train-y.0123456789ab-1-1.bbbb"
    reused = room / f"train-z.{ownership.owner_mark().rpartition('-')[0]}-1.cccc"
    for stage in (foreign, stale, reused):
        stage.mkdir()
    old = time.time() - 8 * 24 * 3600
    os.utime(stale, (old, old))
    with empty.staged(ToyStep()) as mine:
        assert sorted(empty.sweep()) == sorted([stale, reused])
        assert mine.is_dir()
    assert foreign.is_dir()


@pytest.mark.fault("F5")
def test_lock_of_a_dead_process_is_free_and_that_of_a_stopped_one_does_not_wait_for_ever(
    tmp_path: Path,
) -> None:
    path = tmp_path / "lock"

    assert exit_code("die_holding", path) == 0
    with (
        ownership.locked(path),
        pytest.raises(StoreError, match="held"),
        ownership.locked(path, deadline=0.05),
    ):
        pass


def race(empty: Store, contents: list[str], gate: Path) -> list[int]:
    """Processes that commit eight steps at the same moments. Returns the number of conflicts in each."""
    racers = [child("put_at_once", empty.root, gate, content) for content in contents]
    for number in range(8):
        gate.with_name(f"{gate.name}{number}").touch()
        deadline = time.monotonic() + 60
        while len(list(gate.parent.glob(f"{gate.name}{number}-*"))) < len(racers):
            assert time.monotonic() < deadline
            time.sleep(0.001)
    return [racer.wait(60) for racer in racers]


@pytest.mark.fault("F7")
def test_committers_of_the_same_bytes_make_one_artifact(empty: Store, tmp_path: Path) -> None:
    assert race(empty, ["same"] * 3, tmp_path / "gate") == [0, 0, 0]
    assert len(list((empty.root / "train").iterdir())) == 8
    assert empty.verify() == []
    assert everything(empty.root / ".stage") == []


@pytest.mark.fault("F7")
def test_committers_of_other_bytes_make_one_artifact_and_one_error(empty: Store, tmp_path: Path) -> None:
    assert sum(race(empty, ["one", "two"], tmp_path / "gate")) == 8
    assert len(list((empty.root / "train").iterdir())) == 8
    assert len(list((empty.root / ".conflicts").iterdir())) == 8
    assert empty.verify() == []
