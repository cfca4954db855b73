"""The outbox keeps rows in order, once, whatever happens to the process."""

import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipeline.errors import TrackingError
from pipeline.tracking.outbox import FILE, Outbox, Row, glance

ROOT = Path(__file__).parents[3]


@pytest.fixture
def outbox(tmp_path: Path) -> Outbox:
    box = Outbox(tmp_path / FILE)
    box.set_meta("destination", "here")
    return box


@pytest.mark.fault("F11")
def test_same_key_twice_is_one_row(outbox: Outbox) -> None:
    assert outbox.append("a", {"x": 1}, 10)
    assert not outbox.append("a", {"x": 2}, 20)
    assert [(e.payload, e.timestamp_ms) for e in outbox.undelivered("here")] == [({"x": 1}, 10)]


def test_rows_come_in_the_order_they_were_appended(outbox: Outbox) -> None:
    outbox.extend(Row(str(i), {"i": i}, i) for i in (3, 1, 2))
    assert [entry.payload["i"] for entry in outbox.undelivered("here")] == [3, 1, 2]


def test_replacing_row_goes_to_the_end_and_is_pending_again(outbox: Outbox) -> None:
    outbox.append("status", {"state": "FAILED"}, 1, replace=True)
    outbox.append("other", {}, 2)
    for entry in outbox.undelivered("here"):
        outbox.delivered("here", entry.seq)
    assert not outbox.append("status", {"state": "FAILED"}, 9, replace=True)
    assert outbox.pending() == 0
    assert outbox.append("status", {"state": "FINISHED"}, 3, replace=True)
    assert [entry.payload["state"] for entry in outbox.undelivered("here")] == ["FINISHED"]


def test_each_destination_has_its_own_account(outbox: Outbox) -> None:
    outbox.append("a", {}, 1)
    outbox.delivered("here", outbox.undelivered("here")[0].seq)
    assert (outbox.pending("here"), outbox.pending("there")) == (0, 1)


def test_refused_rows_let_others_pass_but_stay_pending(outbox: Outbox) -> None:
    outbox.extend([Row("a", {}, 1), Row("b", {}, 2)])
    outbox.reject("here", outbox.undelivered("here")[0].seq, "no such thing")
    assert [entry.key for entry in outbox.undelivered("here")] == ["b"]
    assert outbox.pending() == 2 and outbox.rejected("here") == [("a", "no such thing")]
    outbox.retry_rejected("here")
    assert len(outbox.undelivered("here")) == 2


def test_nan_is_refused_and_nothing_of_its_transaction_stays(outbox: Outbox) -> None:
    with pytest.raises(ValueError, match="JSON"):
        outbox.extend([Row("a", {}, 1), Row("b", {"x": float("nan")}, 2)])
    assert outbox.pending() == 0


def test_pending_is_counted_from_outside_without_writing(outbox: Outbox, tmp_path: Path) -> None:
    outbox.extend([Row("a", {}, 1), Row("b", {}, 2)])
    assert glance(tmp_path).pending == 2
    assert glance(tmp_path / "nothing").pending == 0


def test_file_that_is_no_outbox_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"not a database, not at all" * 100)
    with pytest.raises(TrackingError, match=r"outbox\.db.*Delete it"):
        Outbox(tmp_path / FILE)
    with pytest.raises(TrackingError, match=FILE):
        glance(tmp_path)


@pytest.mark.fault("F2")
def test_rows_survive_a_kill_right_after_append(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from pipeline.tracking.outbox import Outbox\n"
        "box = Outbox(Path(sys.argv[1]))\n"
        "for i in range(5): box.append(str(i), {'i': i}, i)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / FILE)], cwd=ROOT, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert [entry.payload["i"] for entry in Outbox(tmp_path / FILE).undelivered("")] == [0, 1, 2, 3, 4]


def test_appending_while_another_thread_marks_loses_nothing(outbox: Outbox) -> None:
    seen: list[str] = []
    appended = threading.Event()

    def flush() -> None:
        while not appended.is_set() or outbox.pending():
            for entry in outbox.undelivered("here"):
                seen.append(entry.key)
                outbox.delivered("here", entry.seq)

    thread = threading.Thread(target=flush)
    thread.start()
    for index in range(100):
        outbox.append(f"{index:03}", {}, index)
    appended.set()
    thread.join(30)
    assert seen == [f"{index:03}" for index in range(100)]


def test_reader_in_a_write_protected_directory_still_counts(outbox: Outbox, tmp_path: Path) -> None:
    outbox.append("a", {}, 1)
    outbox.close()
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / FILE).write_bytes((tmp_path / FILE).read_bytes())
    copy.chmod(0o500)
    try:
        assert glance(copy).pending == 1
    finally:
        copy.chmod(0o700)


@pytest.mark.fault("F13")
def test_database_locked_by_a_reader_does_not_stop_appends(outbox: Outbox, tmp_path: Path) -> None:
    outbox.append("a", {}, 1)
    reader = sqlite3.connect(tmp_path / FILE, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM rows").fetchall()
    assert outbox.append("b", {}, 2)
    reader.close()
