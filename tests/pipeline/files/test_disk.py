"""Disks that are really full, file systems without locks, operations that fail: our errors, and what to do."""

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from merge_service.errors import UserError
from pipeline.cli import app as cli
from pipeline.errors import StorageFull
from pipeline.files.disk import explain, write_whole
from pipeline.results.over_time import write_results
from pipeline.store.local import Store
from pipeline.tracking.mlflow.sink import Sent
from pipeline.tracking.outbox import FILE, Outbox
from pipeline.tracking.tracker import sync
from pipeline.workspace.lock import DRIVER_FILE, driver_lock, is_held, read_driver, write_driver, write_last
from tests.pipeline.store_toys import put


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A directory on a disk of 256 kB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("this user may not mount a file system")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as filler:
        try:
            while True:
                filler.write(bytes(512))
        except OSError as error:
            assert error.errno == errno.ENOSPC


def everything(place: Path) -> list[str]:
    return sorted(path.relative_to(place).as_posix() for path in place.rglob("*"))


BIG = {"running": [{"label": "x" * 200}] * 50}


@pytest.mark.fault("F14")
@pytest.mark.parametrize(
    "write",
    [lambda out: write_driver(out, BIG), lambda out: write_results(out / "results.json", BIG), lambda out: put(Store(out / "store"))],
    ids=["driver.json", "results.json", "an artifact"],
)  # fmt: skip
def test_full_disk_is_said_in_bytes_and_leaves_nothing(full: Path, write: Any) -> None:
    out = full / "out"
    Store(out / "store").prepare()
    with driver_lock(out):
        fill(full)
        before = everything(out)
        with pytest.raises(StorageFull, match="bytes are free") as caught:
            write(out)
        assert caught.value.free < 4096 and everything(out) == before


@pytest.mark.fault("F14")
def test_last_words_of_a_driver_are_kept_on_a_full_disk(full: Path) -> None:
    out = full / "out"
    with driver_lock(out):
        fill(full)
        write_last(out, {"ended": True, "failed": {"step": "a", "error": "no room"}})
    assert read_driver(out)["failed"] == {"step": "a", "error": "no room"}
    assert everything(out) == [".driver.lock", DRIVER_FILE]


@pytest.mark.fault("F14")
def test_driver_cannot_begin_on_a_full_disk_and_says_so(full: Path) -> None:
    fill(full)
    with pytest.raises(StorageFull, match="bytes are free"), driver_lock(full / "out"):
        pass


def test_what_a_driver_that_died_left_beside_its_file_is_cleared_by_the_next(tmp_path: Path) -> None:
    dead = subprocess.run(
        [sys.executable, "-c", "import sys; from merge_service.files.leftovers import temporary; from pathlib import Path;"
         "temporary(Path(sys.argv[1])).write_text('half')", str(tmp_path / DRIVER_FILE)],
        cwd=Path(__file__).parents[3], check=True, env=os.environ,
    )  # fmt: skip
    assert dead.returncode == 0 and len(everything(tmp_path)) == 1
    with driver_lock(tmp_path):
        assert everything(tmp_path) == [".driver.lock", DRIVER_FILE]


@pytest.fixture(params=[errno.ENOSYS, errno.ENOLCK])
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.usefixtures("no_locks")
def test_out_without_locks_is_refused_with_what_to_mount_and_can_be_looked_at(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="-o flock"), driver_lock(tmp_path):
        pass
    assert not is_held(tmp_path)


class Sink:
    def __init__(self) -> None:
        self.got: list[str] = []

    def deliver(self, entries: Sequence[Any]) -> Iterator[Sent]:
        self.got += [entry.key for entry in entries]
        yield Sent([*entries])

    def forget(self) -> None: ...


@pytest.mark.usefixtures("no_locks")
def test_rows_are_delivered_where_there_are_no_locks(tmp_path: Path) -> None:
    box = Outbox(tmp_path / FILE)
    box.append("k", {"op": "run"}, 1)
    box.close()
    sink = Sink()
    assert sync(tmp_path, sink=sink, timeout=20) == (0, None) and sink.got == ["k"]


@pytest.mark.usefixtures("no_locks")
def test_store_keeps_its_promises_where_there_are_no_locks(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.prepare()
    assert put(store) == put(store) and store.verify() == []


def test_too_many_open_files_names_the_limit_and_how_to_raise_it(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def fail(**_: Any) -> int:
        try:
            raise OSError(errno.EMFILE, "Too many open files", "x")
        except OSError as error:
            raise RuntimeError("a library could not start") from error

    monkeypatch.setattr(cli, "app", fail)
    assert cli._main() == 2
    said = capsys.readouterr().err
    assert "too many open files" in said and ("ulimit -n" in said or "hard limit" in said)


def test_home_that_cannot_be_written_is_named_with_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/proc/1/nowhere")
    monkeypatch.delenv("HF_HOME", raising=False)
    text = explain(FileNotFoundError(errno.ENOENT, "No such file or directory", "/proc/1/nowhere/.cache/x"))
    assert text is not None and "HOME=/proc/1/nowhere" in text and "XDG_CACHE_HOME" in text
    assert explain(FileNotFoundError(errno.ENOENT, "No such file or directory", "/data/x")) is None
    monkeypatch.setenv("HOME", "/")
    assert explain(FileNotFoundError(errno.ENOENT, "No such file or directory", "/data/x")) is None


def test_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    write_whole(tmp_path / "a.json", "old")

    def pieces() -> Iterator[str]:
        yield "new"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "a.json", pieces())
    assert (tmp_path / "a.json").read_text() == "old" and everything(tmp_path) == ["a.json"]
