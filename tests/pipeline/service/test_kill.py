"""A worker that is killed at a named point: the next one ends with the same log and the same bytes."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from merge_service.checkpoints import WEIGHTS_FILE
from pipeline.service import log as logs
from pipeline.service.intake import uploads
from pipeline.service.log import Log
from pipeline.service.shelf import Directory
from pipeline.service.verify import verify
from tests.pipeline.service import toys

POINTS = [
    ("log.before_append", 1), ("log.before_append", 4), ("log.after_append", 1), ("log.after_append", 3), ("log.after_append", 13),
    ("check.end", 2), ("merge.before_commit", 2), ("merge.after_commit", 3), ("promote.before_append", 2),
    ("promote.after_append", 1), ("remove.mid", 1), ("snapshot.write", 2), ("log.after_seal", 1), ("state.before_mark", 2),
    ("store.after_rename", 4),
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    kept = logs.SEGMENT, logs.SNAPSHOT_EVERY
    toys.small_log()
    yield
    logs.SEGMENT, logs.SNAPSHOT_EVERY = kept


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> toys.Home:
    room = tmp_path_factory.mktemp("undisturbed")
    return toys.story(room / "out", room)


@pytest.mark.parametrize("point, nth", POINTS)
def test_worker_killed_at_a_point_is_followed_by_one_that_ends_alike(
    point: str, nth: int, undisturbed: toys.Home, tmp_path: Path
) -> None:
    marker = tmp_path / "fired"
    faults = {point: {"at": nth, "marker": str(marker)}}
    assert toys.child(tmp_path / "out", tmp_path, faults=faults) == -signal.SIGKILL and marker.exists()
    acknowledged = Log.open(Directory(tmp_path / "out/service/toy")).state
    again = toys.story(tmp_path / "out", tmp_path)
    assert acknowledged.arrivals.keys() <= again.log.state.arrivals.keys()
    assert toys.said(again) == toys.said(undisturbed)
    served = again.log.state.served
    assert served == undisturbed.log.state.served
    record = again.store.find(served.fingerprint)
    assert record is not None and record.sha256(WEIGHTS_FILE) == served.sha256
    assert verify(tmp_path / "out") == []
    left = [path.name for path in (tmp_path / "out/service/toy/incoming").iterdir()]
    assert left == []


@pytest.mark.parametrize(("point", "nth"), [("upload.part", 3), ("upload.complete", 1)])
def test_upload_killed_at_a_point_goes_on_and_is_one_arrival(
    point: str, nth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "PART_BYTES", toys.SMALL_PART)
    faults = {point: {"at": nth, "marker": str(tmp_path / "fired")}}
    assert toys.child(tmp_path / "out", tmp_path, faults=faults, what="sent") == -signal.SIGKILL
    again, parts = toys.sent(tmp_path / "out", tmp_path)
    every = -(-toys.expert(tmp_path, toys.TASKS[0]).stat().st_size // toys.SMALL_PART)
    assert parts == [
        *range(nth - 1 if point == "upload.part" else every, every)
    ]  # the one that was cut off, and those after it
    (arrival,) = again.log.state.arrivals.values()
    assert again.log.state.shown(arrival.id) == "promoted" and verify(tmp_path / "out") == []
    length = again.log.state.seq
    final, more = toys.sent(tmp_path / "out", tmp_path)  # its answer was lost
    assert (final.log.state.seq, more) == (length, [])
    assert [*(again.place / "incoming").iterdir()] == []
