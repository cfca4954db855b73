"""Leases: one driver per step, taken over when the owner has ended, independent of clocks; in a directory and at a URL."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from merge_service.faults import VARIABLE
from pipeline.errors import StorageFull
from pipeline.store import lease
from pipeline.store.lease import OWNERS, ROOM, SILENT_SECONDS, Leases
from pipeline.store.local import Store
from pipeline.store.open import store_at
from pipeline.store.remote import MIRROR

STEP = "a" * 64
ROOT = Path(__file__).parents[3]


@pytest.fixture(params=["directory", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv(MIRROR, str(tmp_path / "mirror"))
    made = store_at(
        str(tmp_path / "store") if request.param == "directory" else f"memory://{uuid.uuid4().hex}", tmp_path
    )
    made.prepare()
    return made


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def elsewhere(one: Leases) -> None:
    """Turn an owner into one of another host: only its heartbeat shows whether it is alive."""
    held = vars(one.holder) | {"key": f"elsewhere.{uuid.uuid4().hex}", "mark": "elsewhere-1-1"}
    one.holder = lease.Holder(**held)
    one._text = json.dumps(held).encode()


def test_step_is_leased_to_one_driver_at_a_time_and_the_other_learns_to_whom(
    store: Store, tmp_path: Path
) -> None:
    one, two = Leases(store, "one", tmp_path / "one"), Leases(store, "two", tmp_path / "two")
    assert one.take(STEP) is None
    holder = two.take(STEP)
    assert holder is not None and str(tmp_path / "one") in str(holder) and "study one" in str(holder)
    assert two.holder_of(STEP) == holder
    two.give_back(STEP)
    assert two.take(STEP) == holder, "only the owner gives a lease back"
    one.give_back(STEP)
    assert two.holder_of(STEP) is None and two.take(STEP) is None


def test_lease_of_another_host_is_taken_over_only_after_its_heartbeat_has_been_silent_by_the_watchers_clock(
    store: Store, tmp_path: Path
) -> None:
    clock = Clock()
    one, two = Leases(store, "one", tmp_path), Leases(store, "two", tmp_path, clock)
    elsewhere(one)
    one.take(STEP)
    assert two.take(STEP) is not None
    for _ in range(5):
        clock.now += SILENT_SECONDS - 1
        one._beat()
        assert two.holder_of(STEP) is not None, "it lives"
    clock.now += SILENT_SECONDS - 1
    assert two.take(STEP) is not None
    clock.now += 1
    assert two.holder_of(STEP) is None and two.take(STEP) is None


def test_owner_that_comes_back_after_it_was_given_up_takes_nothing_from_its_successor(
    store: Store, tmp_path: Path
) -> None:
    clock = Clock()
    one, two = Leases(store, "one", tmp_path), Leases(store, "two", tmp_path, clock)
    elsewhere(one)
    one.take(STEP)
    two.take(STEP)
    clock.now += SILENT_SECONDS
    assert two.take(STEP) is None
    one._beat()
    one.give_back(STEP)
    three = Leases(store, "three", tmp_path)
    holder = three.take(STEP)
    assert holder is not None and holder.study == "two"


def test_of_two_that_would_take_over_one_does(store: Store, tmp_path: Path) -> None:
    clock = Clock()
    gone, two, three = (Leases(store, name, tmp_path, clock) for name in ("gone", "two", "three"))
    elsewhere(gone)
    gone.take(STEP)
    assert two.take(STEP) is not None and three.take(STEP) is not None
    clock.now += SILENT_SECONDS
    assert two.take(STEP) is None
    holder = three.take(STEP)
    assert holder is not None and holder.study == "two"


def test_driver_that_ends_gives_all_its_leases_back(store: Store, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Leases(store, "one", tmp_path) as one:
        one.take(STEP)
        one.take("b" * 64)
        raise KeyboardInterrupt
    assert store.shelf.sizes(ROOM) == {}


def test_lease_that_was_cut_while_it_was_written_is_free_after_the_silence(
    store: Store, tmp_path: Path
) -> None:
    clock = Clock()
    store.shelf.create(f"{ROOM}/{STEP}", b'{"key": "x')
    one = Leases(store, "one", tmp_path, clock)
    assert one.take(STEP) is not None
    clock.now += SILENT_SECONDS
    assert one.take(STEP) is None


def test_killed_owner_of_this_host_holds_nothing_and_leaves_nothing_behind(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.prepare()
    program = (
        "import sys; from pathlib import Path; from pipeline.store.lease import Leases; from pipeline.store.local import Store\n"
        "with Leases(Store(Path(sys.argv[1])), 'dead', Path('x')) as one: one.take(sys.argv[2])"
    )
    faults = {"lease.after_take": {"marker": str(tmp_path / "marker")}}
    dead = subprocess.run(
        [sys.executable, "-c", program, str(store.root), STEP],
        cwd=ROOT, env=os.environ | {VARIABLE: json.dumps(faults)}, check=False,
    )  # fmt: skip
    assert dead.returncode == -signal.SIGKILL and len(store.shelf.sizes(ROOM)) == 2
    assert Leases(store, "two", tmp_path).take(STEP) is None, "without waiting for its heartbeat"
    other = Leases(store, "three", tmp_path)
    with other:
        assert [key for key in store.shelf.sizes(OWNERS) if "dead" in key] == []
    assert len(store.shelf.sizes(OWNERS)) == 1, "the heartbeat of the dead is gone, that of the living stays"


def test_heartbeat_goes_on_while_the_driver_is_busy_and_stops_with_it(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.01)
    with Leases(store, "one", tmp_path) as one:
        one.take(STEP)
        key = f"{OWNERS}/{one.holder.key}"
        first = store.shelf.read(key)
        until = time.monotonic() + 30
        while store.shelf.read(key) == first and time.monotonic() < until:
            time.sleep(0.01)
        assert store.shelf.read(key) != first
    assert store.shelf.read(key) is None


def test_full_disk_while_leasing_is_said_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "store")
    store.prepare()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    one = Leases(store, "one", tmp_path)
    monkeypatch.setattr(lease.Files, "create", full)
    with pytest.raises(StorageFull, match="bytes are free"):
        one.take(STEP)
