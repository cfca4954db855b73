"""A power cut at any moment: a file with its final name is whole, because everything was synced to disk in the right order.

The calls of the C library are recorded (tests/power_cut.py). A disk keeps what was synced to it and may lose everything
else.
"""

from pathlib import Path

import pytest

from tests.power_cut import COMPILER, NEEDS, Disk, Event, recorded

pytestmark = [pytest.mark.fault("F36"), pytest.mark.skipif(COMPILER is None, reason=NEEDS)]

COMMIT = """
import sys
from pathlib import Path
sys.path.insert(0, "tests/pipeline")
from tests.pipeline.store_toys import put
from pipeline.store.local import Store
root = Path(sys.argv[1])
root.mkdir()
store = Store(root / "store")
store.prepare()
put(store, content={"weights.bin": b"w" * 9000, "deeper/config.json": b"{}"})
(root / "returned").write_text("committed")
"""
APPEND = """
import sys
from pathlib import Path
from pipeline.tracking.outbox import Outbox
root = Path(sys.argv[1])
root.mkdir()
box = Outbox(root / "outbox.db")
for number in range(3):
    box.append(f"row {number}", {"n": number}, number)
    (root / f"returned {number}").write_text("appended")
"""
MERGE = """
import sys
from pathlib import Path
import numpy as np
from merge_service.checkpoints.shards import ShardedWriter
from merge_service.checkpoints import CheckpointWriter
from merge_service.checkpoints.writer import SlotWriter
root, sharded = Path(sys.argv[1]), sys.argv[2] == "sharded"
root.mkdir()
layout = {"a": ("F32", (64,)), "b": ("F32", (8,))}
parts = [{name: kind} for name, kind in layout.items()]
make = lambda: ShardedWriter(root / "m.safetensors", parts, {}) if sharded else CheckpointWriter(root / "m.safetensors", layout)
for _ in range(2):
    with make() as writer:
        for name, (_, (size,)) in layout.items():
            writer.write_stored(name, 0, np.ones(size, np.float32))
(root / "returned").write_text("written")
"""
SLOT = """
import sys
from pathlib import Path
import numpy as np
from merge_service.checkpoints import CheckpointWriter
from merge_service.checkpoints.writer import SlotWriter
root = Path(sys.argv[1])
root.mkdir()
with CheckpointWriter(root / "m.safetensors", {"a": ("F32", (64,))}) as writer:
    slot = writer.slot()
    (root / "handed over").write_text("to another process")
    with SlotWriter(slot) as other:
        other.write_stored("a", 0, np.ones(64, np.float32))
    (root / "written elsewhere").write_text("by another process")
    writer.account(other.written)
"""
CHECKPOINT = """
import sys
from pathlib import Path
from workers.training.checkpoints import Checkpoints
root = Path(sys.argv[1])
root.mkdir()
checkpoints = Checkpoints(root, "f" * 64)
checkpoints.claim()
(root / "claimed").write_text("by this process")
for step in (2, 4):
    checkpoints.stage(step)
    (checkpoints.staged(step) / "state.safetensors").write_bytes(b"s" * 9000)
    checkpoints.complete(step, {})
"""


def at(events: list[Event], call: str, name: str) -> list[int]:
    """The positions of calls whose path ends in this name; for renames and links the new name counts."""
    return [
        n for n, event in enumerate(events) if event.call == call and (event.to or event.path).name == name
    ]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "disk"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("power") / "disk" / "store"


@pytest.fixture(scope="module")
def commit(store: Path) -> list[Event]:
    return recorded(COMMIT, store.parent)


def test_artifact_gets_its_name_when_every_file_its_record_and_its_folders_are_safe(
    commit: list[Event], store: Path
) -> None:
    disk, named = Disk(), 0
    for event in disk.passing(commit):
        if event.call == "rename" and event.to is not None and event.to.parent == store / "train":
            named += 1
            assert [what for what in disk.unsafe(event.path) if what != "name ."] == []
    assert named == 1


def test_record_of_an_artifact_is_written_after_every_other_file_is_safe(commit: list[Event]) -> None:
    disk = Disk()
    for event in disk.passing(commit):
        if event.call == "write" and event.path.name == "record.json":
            unsafe = [what for what in disk.unsafe(event.path.parent) if what.startswith("content")]
            assert unsafe in ([], ["content of record.json"])
    assert at(commit, "write", "record.json")[-1] > max(
        n for name in ("weights.bin", "config.json") for n in at(commit, "sync", name)
    )


def test_artifact_and_the_name_that_leads_to_it_are_safe_when_commit_returns(
    commit: list[Event], store: Path
) -> None:
    disk = Disk()
    for event in disk.passing(commit):
        if event.path.name == "returned":
            break
    assert event.path.name == "returned"
    lost = [what for what in disk.unsafe(store) if what.split(" ")[-1].startswith(("train", ".names"))]
    assert lost == []


def test_name_leads_to_an_artifact_before_the_artifact_is_there(commit: list[Event], store: Path) -> None:
    """Otherwise a power cut between the two would leave an artifact that cannot be found."""
    disk = Disk()
    for event in disk.passing(commit):
        if event.call == "rename" and event.to is not None and event.to.parent == store / "train":
            assert disk.unsafe(store / ".names" / event.to.name[-16:]) == []


def test_row_of_the_outbox_is_safe_when_append_returns(root: Path) -> None:
    disk, returned, events = Disk(), 0, recorded(APPEND, root)
    for event in disk.passing(events):
        if event.call == "write" and event.path.name.startswith("returned"):
            returned += 1
            assert [what for what in disk.unsafe(root) if what == "content of outbox.db-wal"] == []
    assert returned == 3 and len(at(events, "write", "outbox.db-wal")) >= 3


@pytest.mark.parametrize("form", ["one file", "sharded"])
def test_merged_checkpoint_gets_its_name_when_it_is_safe(form: str, root: Path) -> None:
    disk, events, named = Disk(), recorded(MERGE, root, form), 0
    for event in disk.passing(events):
        if event.call == "rename" and event.to is not None:
            named += 1
            assert [what for what in disk.unsafe(event.path) if what.startswith("content")] == []
            if event.to.suffix == ".json":  # the index is written last, the older one was removed first
                shards = [path for path in root.iterdir() if "-of-" in path.name]
                assert shards and all(disk.unsafe(shard) == [] for shard in shards)
            elif form == "sharded":
                assert disk.unsafe(root / "m.safetensors.index.json") == []
        if event.path.name == "returned":
            break
    assert named == (6 if form == "sharded" else 2)
    assert [
        what for what in disk.unsafe(root) if "m-0" in what or what.endswith(("m.safetensors", ".json"))
    ] == []


def test_blocks_that_another_process_writes_are_safe_before_it_says_so(root: Path) -> None:
    disk, seen = Disk(), 0
    for event in disk.passing(recorded(SLOT, root)):
        if event.call == "write" and event.path.name in ("handed over", "written elsewhere"):
            seen += 1
            assert [what for what in disk.unsafe(root) if what.startswith("content of .m")] == []
    assert seen == 2


def test_checkpoint_of_an_expert_counts_when_its_files_and_its_marker_are_safe(root: Path) -> None:
    disk, done = Disk(), 0
    for event in disk.passing(recorded(CHECKPOINT, root)):
        if event.path.name == "claimed":
            assert "content of owner" not in disk.unsafe(root)
        if event.call == "rename":
            done += 1
            assert [what for what in disk.unsafe(event.path) if what.startswith("content")] == []
        if event.call == "unlink" and event.path.name == "state.safetensors":  # the previous one is removed
            assert done == 2 and disk.unsafe(root / "checkpoints" / "step-000000004") == []
    assert done == 2
