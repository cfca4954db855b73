"""A power cut at any moment of a service's work: what was acknowledged is there, and the service ends with the same bytes.

One run of the service is recorded with the bytes of its files. Then any moment can be cut off: content that was not synced and names of
folders that were not are lost, or are there in any mixture (`tests/power_cut.py`).
"""

import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from merge_service.live import Removed
from pipeline.service import log as logs
from pipeline.service.home import Home
from pipeline.service.operations import Operations, Sender
from pipeline.service.registry.delivery import Registry
from pipeline.service.verify import verify
from tests.pipeline.service import toys
from tests.power_cut import COMPILER, NEEDS, Event, Remains, recorded

pytestmark = [pytest.mark.fault("F36"), pytest.mark.skipif(COMPILER is None, reason=NEEDS)]

CODE = """
import sys
from pathlib import Path
from tests.pipeline.service import toys
from tests.pipeline.service.test_service_power_cut import whole
toys.small_log()
toys.uploads.PART_BYTES = toys.SMALL_PART
root = Path(sys.argv[1])
root.mkdir()
whole(root / "out", Path(sys.argv[2]), root)
"""


CACHE = "it is made again when it is needed"
"""How `verify` ends what it says about a damaged streaming state."""


class Nowhere:
    """A tracker that is down."""

    def send(self, *_: object) -> None:
        raise ConnectionError


def whole(out: Path, room: Path, root: Path | None = None) -> Home:
    """Experts come as an upload and as files, one is removed, another one comes, and rows go to the outbox; what is done already is found
    done. Below `root` a file is written when something is acknowledged: the number of the last entry and its sha256."""

    def acknowledged(home: Home) -> None:
        state = home.log.refresh()
        if root is not None:
            (root / f"acknowledged {state.seq} {state.head}").write_text(" ")

    home, _ = toys.sent(out, room)
    acknowledged(home)
    for task in toys.TASKS[1:4]:
        home = toys.home(out)
        every = [one for one in home.log.state.arrivals.values() if one.task == task]
        if not every:
            Operations(home).arrive(toys.expert(room, task), Sender(task, "tests"))
            acknowledged(home)
        toys.work(home)
        if task == toys.TASKS[2] and not any(
            one.status == "removed" for one in home.log.state.arrivals.values()
        ):
            first = next(one.id for one in home.log.state.arrivals.values() if one.task == toys.TASKS[1])
            Operations(home).remove(first, Removed("asked", force=True))
            acknowledged(home)
            toys.work(home)
        registry = Registry(home.place, home.log, home.config, Nowhere())
        registry.follow()
        registry.outbox.close()
    return home


@dataclass
class Run:
    """A recorded run: its calls, and the log at its end."""

    root: Path
    room: Path
    events: list[Event]
    said: list[tuple[str, str | None, object]]
    served: object


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    kept = logs.SEGMENT, logs.SNAPSHOT_EVERY, toys.uploads.PART_BYTES
    toys.small_log()
    toys.uploads.PART_BYTES = toys.SMALL_PART
    yield
    logs.SEGMENT, logs.SNAPSHOT_EVERY, toys.uploads.PART_BYTES = kept


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    place = tmp_path_factory.mktemp("cut")
    root, room, kept = place / "disk", place / "room", place / "kept"
    room.mkdir()
    kept.mkdir()
    events = recorded(CODE, root, room, kept=kept)
    home = toys.home(root / "out")
    return Run(root, room, events, toys.said(home), home.log.state.served)


def cut(run: Run, at: int, luck: random.Random | None, place: Path) -> None:
    """Cut the power before call `at`, start again on what is left, and compare with the end of the undisturbed run."""
    remains, acknowledged = Remains(run.root), list[tuple[int, str]]()
    for event in run.events[:at]:
        remains.take(event)
        if event.call == "write" and event.path.name.startswith("acknowledged"):
            acknowledged.append((int(event.path.name.split()[1]), event.path.name.split()[2]))
    remains.write_out(place / "disk", luck)
    (place / "room").mkdir()
    if (run.room / "upload").exists() and acknowledged:
        shutil.copy(run.room / "upload", place / "room")
    out = place / "disk/out"
    if acknowledged:
        found = {entry.seq: entry.sha256 for entry in toys.home(out).log.entries()}
        assert [(seq, found.get(seq)) for seq, _ in acknowledged] == acknowledged
    again = whole(out, place / "room")
    assert toys.said(again) == run.said
    assert again.log.state.served == run.served
    assert [problem for problem in verify(out) if not problem.endswith(CACHE)] == []


def test_copies_of_a_run_give_its_files(run: Run, tmp_path: Path) -> None:
    remains = Remains(run.root)
    for event in run.events:
        remains.take(event)
    for path in [run.root, *run.root.rglob("*")]:
        if path.is_dir():
            remains.take(Event("sync", path))
    remains.write_out(tmp_path / "disk", None)
    log = "out/service/toy/log"
    names = sorted(path.name for path in (run.root / log).iterdir() if path.is_file())
    assert names and names == sorted(
        path.name for path in (tmp_path / "disk" / log).iterdir() if path.is_file()
    )
    assert all(
        (tmp_path / "disk" / log / name).read_bytes() == (run.root / log / name).read_bytes()
        for name in names
    )


@pytest.mark.parametrize("part", range(1, 5))
def test_power_cut_loses_nothing_acknowledged_and_the_service_ends_alike(
    run: Run, part: int, tmp_path: Path
) -> None:
    cut(run, part * len(run.events) // 5, random.Random(part) if part % 2 else None, tmp_path)


@pytest.mark.chaos
@pytest.mark.parametrize("luck", [None, 1, 2])
@pytest.mark.parametrize("part", range(30))
def test_power_cut_at_many_moments_loses_nothing_acknowledged(
    run: Run, part: int, luck: int | None, tmp_path: Path
) -> None:
    at = random.Random(part).randrange(len(run.events))
    cut(run, at, None if luck is None else random.Random(100 * luck + part), tmp_path)
