"""A full disk: a file system in memory, filled to its last byte while the software writes to it.

The kernel itself refuses the writes; nothing is mocked. Whole runs are stopped at a named point, the disk is filled,
and they continue.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from merge_service.checkpoints import CheckpointWriter
from pipeline.errors import StorageFull, TrackingError
from pipeline.store.local import Store
from pipeline.tracking.outbox import Outbox
from pipeline.workspace.lock import driver_lock, write_driver
from tests.faults.harness import PATIENCE, Faults, created, must_go_on, wait_until
from tests.pipeline.store_toys import ToyStep, put
from tests.world import Cluster, World, start

NEEDS = "a disk of one's own to fill (mount -t tmpfs) needs root and the right to mount"


class Disk:
    """A file system of `megabytes` at `root`."""

    def __init__(self, root: Path, megabytes: int) -> None:
        self.root, self._filler = root, root / "filler"
        root.mkdir()
        answer = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(root)], capture_output=True
        )
        if answer.returncode:
            pytest.skip(NEEDS)

    def fill(self) -> None:
        """Fill the disk to its last byte."""
        with self._filler.open("ab", buffering=0) as filler, contextlib.suppress(OSError):
            for size in (2**20, 2**12, 1):
                with contextlib.suppress(OSError):
                    while filler.write(bytes(size)) == size:
                        pass
        assert shutil.disk_usage(self.root).free == 0

    def empty(self) -> None:
        self._filler.unlink()

    def unmount(self) -> None:
        subprocess.run(["umount", "-l", str(self.root)], check=True)


@pytest.fixture
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    if os.geteuid() or not shutil.which("mount"):
        pytest.skip(NEEDS)
    made = Disk(tmp_path / "disk", getattr(request, "param", 8))
    yield made
    made.unmount()


pytestmark = pytest.mark.fault("F14")


def test_artifact_that_does_not_fit_is_refused_with_bytes_and_those_before_it_stay(disk: Disk) -> None:
    store = Store(disk.root / "store")
    store.prepare()
    first = put(store)
    other = ToyStep(spec={"number": 2})
    with pytest.raises(StorageFull, match=r"bytes are free") as caught:
        put(store, other, content={"weights.bin": bytes(9 * 2**20)})
    assert caught.value.free < 9 * 2**20
    assert list((store.root / ".stage").iterdir()) == [] and store.verify() == []
    assert store.open_verified(first) and not store.has("train", other.fingerprint)
    assert put(store, other).files == first.files


@pytest.mark.parametrize("moment", ["before the stage", "before the commit"])
def test_step_on_a_disk_without_a_byte_is_refused_and_goes_through_when_there_is_room(
    disk: Disk, moment: str
) -> None:
    store = Store(disk.root / "store")
    store.prepare()
    step = ToyStep()
    with pytest.raises(StorageFull, match="bytes are free"):
        if moment == "before the stage":
            disk.fill()
        with store.staged(step) as stage:
            (stage / "weights.bin").write_bytes(bytes(9000))
            disk.fill()
            store.commit(step, stage, {"text": "x" * 20_000}, seconds=0)
    assert list((store.root / ".stage").iterdir()) == [] and not store.has("train", step.fingerprint)
    disk.empty()
    put(store)
    assert store.verify() == []


def test_merged_checkpoint_that_does_not_fit_leaves_the_older_one(disk: Disk) -> None:
    path = disk.root / "m.safetensors"
    path.write_bytes(b"older")
    with pytest.raises(OSError, match="No space left"):
        CheckpointWriter(path, {"a": ("F32", (3 * 2**20,))})
    assert [file.name for file in disk.root.iterdir()] == [path.name] and path.read_bytes() == b"older"


def test_row_that_does_not_fit_into_the_outbox_is_an_error_and_those_before_it_stay(disk: Disk) -> None:
    box = Outbox(disk.root / "outbox.db")
    assert box.append("a", {}, 1)
    disk.fill()
    with pytest.raises(TrackingError, match=r"outbox\.db.*full"):
        box.append("b", {"x": "y" * 100_000}, 2)
    disk.empty()
    assert box.append("b", {"x": "y" * 100_000}, 2) and box.pending("here") == 2


def test_driver_that_cannot_say_what_it_does_is_told_that_the_disk_is_full(disk: Disk) -> None:
    out = disk.root / "out"
    with driver_lock(out):
        disk.fill()
        with pytest.raises(StorageFull, match=str(disk.root)):
            write_driver(out, {"running": [{"label": "x" * 200}] * 50})
        assert not list(out.glob("*.tmp"))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.parametrize("disk", [256], indirect=True)
@pytest.mark.parametrize(
    ("point", "nth"),
    [("train.after_step", 1), ("store.before_record", 2), ("merge.start", 1), ("driver.after_commit", 4)],
)
def test_run_on_a_disk_that_fills_ends_with_bytes_and_its_rerun_is_the_same(
    point: str, nth: int, disk: Disk, world: World, cluster: Cluster, undisturbed: Path, tmp_path: Path, record_property: Any
) -> None:  # fmt: skip
    out, faults = disk.root / "out", Faults(tmp_path).at(point, nth=nth, do="stop")
    process = start("run", world.study(), "--out", out, "--address", cluster.address, faults=faults.placed)
    marker = faults.markers[0]
    wait_until(lambda: marker.exists() and marker.read_text(), "the point was not reached")
    disk.fill()
    os.kill(int(marker.read_text()), signal.SIGCONT)
    said = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 1, said
    assert re.search(r"StorageFull: .*[\d,]+ (bytes )?are free", said) and "Traceback" not in said, said
    before = created(out)
    disk.empty()
    record_property("artifacts kept", str(len(before)))
    must_go_on(world.study(), out, undisturbed, cluster.address, cluster)
