"""The log on disk: exclusive, durable, sealed; and whatever was changed in it is named."""

import json
import threading
from pathlib import Path

import pytest

from merge_service.live import BrokenLog, Draft, Entry, Note, ServiceStarted, State, Version, entry_of
from pipeline.service import log as logs
from pipeline.service.log import Log
from pipeline.service.shelf import Bucket, Directory, Shelf
from pipeline.store.objects import Objects
from tests.pipeline.service import toys

START = Draft(ServiceStarted("toy", Version(0, "f", "s"), {}, 1))


def note(log: Log, text: str) -> Entry | None:
    return log.append(lambda state: Draft(Note(text)))


def filled(shelf: Shelf, count: int) -> Log:
    log = Log.open(shelf, lambda: 1.0)
    log.append(lambda state: START)
    for number in range(2, count + 1):
        note(log, f"note {number}")
    return log


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of eight entries, and a snapshot at every fourth."""
    monkeypatch.setattr(logs, "SEGMENT", 8)
    monkeypatch.setattr(logs, "SNAPSHOT_EVERY", 4)


@pytest.fixture(params=["directory", "bucket"])
def shelf(request: pytest.FixtureRequest, tmp_path: Path) -> Shelf:
    if request.param == "directory":
        return Directory(tmp_path)
    return Bucket(Objects(f"memory://{tmp_path.name}-{id(tmp_path)}"))


def test_log_is_sealed_into_segments_and_read_again_from_them(shelf: Shelf, small: None) -> None:
    log = filled(shelf, 21)
    assert [key.rpartition("/")[2][:12] for key in shelf.keys("log/sealed")] == [
        "000000000001",
        "000000000009",
    ]
    singles = [key for key in shelf.keys("log") if key.rpartition("/")[2][0] == "0"]
    assert len(singles) == 5
    again = Log.open(shelf)
    assert again.state == log.state and again.state.seq == 21
    assert [entry.seq for entry in again.entries(6)] == list(range(7, 22))
    assert next(again.entries()).data == START.data


def test_a_reader_that_is_behind_by_a_whole_segment_follows(shelf: Shelf, small: None) -> None:
    log = filled(shelf, 3)
    reader = Log.open(shelf)
    for number in range(4, 20):
        note(log, f"note {number}")
    assert reader.refresh() == log.state


def test_of_two_writers_one_is_first_and_the_other_decides_again(tmp_path: Path) -> None:
    filled(Directory(tmp_path), 1)
    seen: list[list[int]] = [[], []]

    def write(which: int) -> None:
        log = Log.open(Directory(tmp_path))
        for number in range(30):
            log.append(
                lambda state, number=number: seen[which].append(state.seq) or Draft(Note(f"{which} {number}"))
            )

    threads = [threading.Thread(target=write, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    entries = [*Log.open(Directory(tmp_path)).entries()]
    texts = [entry.data.text for entry in entries[1:]]
    assert len(texts) == 60 and sorted(texts) == sorted(f"{a} {b}" for a in range(2) for b in range(30))
    for which in range(2):
        assert [text for text in texts if text.startswith(f"{which} ")] == [f"{which} {b}" for b in range(30)]


def test_a_writer_that_stalled_over_a_seal_loses_and_its_file_is_no_entry(
    tmp_path: Path, small: None
) -> None:
    shelf = Directory(tmp_path)
    log = filled(shelf, 3)
    stale, decided = Log.open(shelf), list[int]()

    def decide(state: State) -> Draft:
        decided.append(state.seq)
        if len(decided) == 1:
            for number in range(4, 13):
                note(log, f"note {number}")  # past the seal of entries 1 to 8
        return Draft(Note("late"))

    entry = stale.append(decide)
    assert decided == [3, 12] and entry is not None and entry.seq == 13
    assert not shelf.has("log/000000000004.json")
    assert Log.open(shelf).state.seq == 13
    orphan = entry_of(Draft(Note("never")), 4, next(e.sha256 for e in log.entries() if e.seq == 3), 0)
    shelf.write("log/000000000004.json", orphan.text)
    assert Log.open(shelf).state == stale.state
    stale.tidy()
    assert not shelf.has("log/000000000004.json")


@pytest.mark.parametrize("seq", [1, 2, 5, 8, 9, 14, 18])
@pytest.mark.parametrize("how", ["altered", "removed", "reordered", "cut"])
def test_tampering_with_an_entry_is_found_and_the_entry_named(
    seq: int, how: str, tmp_path: Path, small: None
) -> None:
    shelf = Directory(tmp_path)
    filled(shelf, 20)
    sealed = seq <= 16
    first = (seq - 1) // 8 * 8 + 1
    key = f"log/sealed/{first:012d}-{first + 7:012d}.jsonl" if sealed else f"log/{seq:012d}.json"
    lines = (shelf.read(key) or b"").splitlines(keepends=True)
    at = seq - first if sealed else 0
    if how == "altered":
        lines[at] = lines[at].replace(b"note", b"vote").replace(b"toy", b"boy")
    elif how == "removed":
        del lines[at]
    elif how == "cut":
        lines[at] = lines[at][: len(lines[at]) // 2] + (b"\n" if sealed else b"")
    elif sealed:
        lines[at], lines[(at + 1) % 8] = lines[(at + 1) % 8], lines[at]
    else:
        other = f"log/{seq + 1:012d}.json"
        mine, theirs = shelf.read(key) or b"", shelf.read(other) or b""
        shelf.write(other, mine)
        lines = [theirs]
    if lines or sealed:
        shelf.write(key, b"".join(lines))
    else:
        shelf.remove(key)
    with pytest.raises(BrokenLog) as found:
        Log.open(shelf)
    assert key.rpartition("/")[2] in str(found.value) or f"log entry {seq}" in str(found.value)


def test_an_entry_that_was_forged_with_its_own_digest_breaks_the_chain(tmp_path: Path) -> None:
    shelf = Directory(tmp_path)
    log = filled(shelf, 5)
    third = next(entry for entry in log.entries() if entry.seq == 3)
    shelf.write("log/000000000003.json", entry_of(Draft(Note("forged")), 3, third.prev, 0).text)
    with pytest.raises(BrokenLog, match="log entry 4 does not follow entry 3"):
        Log.open(shelf)


def test_entries_that_were_cut_off_at_the_end_are_missed_by_the_kept_state(
    tmp_path: Path, small: None
) -> None:
    shelf = Directory(tmp_path)
    filled(shelf, 12)
    shelf.remove("log/000000000012.json")
    with pytest.raises(BrokenLog, match="from 12 on were removed"):
        Log.open(shelf)


def test_damaged_snapshot_is_made_again_from_the_entries(shelf: Shelf, small: None) -> None:
    log = filled(shelf, 10)
    text = (shelf.read("log/snapshot.json") or b"").replace(b'"seq":8', b'"seq":7')
    assert text != shelf.read("log/snapshot.json")
    shelf.write("log/snapshot.json", text)
    again = Log.open(shelf)
    assert again.state == log.state and not again.is_snapshot_sound()
    for number in range(11, 13):
        note(again, f"note {number}")
    assert again.is_snapshot_sound()


def test_snapshot_of_another_log_is_not_believed(tmp_path: Path, small: None) -> None:
    filled(Directory(tmp_path / "a"), 10)
    other = Log.open(Directory(tmp_path / "b"), lambda: 2.0)
    other.append(lambda state: START)
    for number in range(2, 11):
        note(other, f"other {number}")
    for key in ("log/snapshot.json",):
        Directory(tmp_path / "b").write(key, Directory(tmp_path / "a").read(key) or b"")
    assert Log.open(Directory(tmp_path / "b")).state == other.state


def test_an_entry_that_the_state_does_not_allow_is_never_written(tmp_path: Path) -> None:
    log = filled(Directory(tmp_path), 2)
    with pytest.raises(BrokenLog, match="service_started"):
        log.append(lambda state: START)
    assert Log.open(Directory(tmp_path)).state.seq == 2
    assert json.loads((tmp_path / "log/000000000002.json").read_text())["seq"] == 2


def test_service_refuses_to_open_a_log_that_was_changed(tmp_path: Path) -> None:
    service = toys.home(tmp_path / "out")
    toys.arrive(service, toys.expert(tmp_path, "task0"), "task0")
    path = tmp_path / "out/service/toy/log/000000000004.json"
    path.write_text(path.read_text().replace('"norm":', '"norn":'))
    with pytest.raises(BrokenLog, match=r"000000000004\.json"):
        toys.home(tmp_path / "out")
