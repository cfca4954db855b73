"""Output in shards: the tensors of the single file in Hugging Face's layout, complete at every moment, and leftovers of runs that ended."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from merge_service.checkpoints import CONFIG_FILE, WEIGHTS_FILE, Checkpoint, bytes_of
from merge_service.checkpoints.shards import MOST, split
from merge_service.errors import CheckpointError
from merge_service.files import owner_mark
from merge_service.merge import advance, fold, merge
from tests.merge_service import toys
from tests.merge_service.toys import Files

INDEX = "m.safetensors.index.json"


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def sharded(files: Files, shard_bytes: int | None = 80, name: str = "m.safetensors", **options) -> Path:
    """The sharded merge; returns the path that its report gives."""
    report = merge(
        "ties", {}, files.start, files.paths, files.room / "out" / name, shard_bytes=shard_bytes, **options
    )
    assert report.out is not None
    return report.out


def listed(index: Path) -> list[str]:
    return sorted(path.name for path in index.parent.iterdir())


def same(one: Path, other: Path) -> bool:
    with Checkpoint.open(one) as a, Checkpoint.open(other) as b:
        assert list(a.tensors) == list(b.tensors)
        return all(
            (a.tensors[n].dtype, a.tensors[n].shape, a.raw(n).tobytes())
            == (b.tensors[n].dtype, b.tensors[n].shape, b.raw(n).tobytes())
            for n in a.tensors
        )  # fmt: skip


@pytest.mark.parametrize("shard_bytes", [1, 40, 80, 200])
@pytest.mark.parametrize("threads", [1, 3])
def test_shards_hold_the_tensors_of_the_single_file_in_its_order(
    files: Files, shard_bytes: int, threads: int
) -> None:
    files.merge("ties")
    index = sharded(files, shard_bytes, threads=threads)
    assert index.name == INDEX and same(index, files.out) and same(index.parent, files.out)
    body = json.loads(index.read_text())
    with Checkpoint.open(files.out) as whole:
        assert list(body["weight_map"]) == list(whole.tensors)
        sizes = {name: info.nbytes for name, info in whole.tensors.items()}
        made = whole.metadata
    assert body["metadata"] == {"total_size": sum(sizes.values())}
    shards = list(dict.fromkeys(body["weight_map"].values()))
    assert shards == [f"m-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    assert listed(index) == sorted([*shards, INDEX])
    for shard in shards:
        held = [name for name, where in body["weight_map"].items() if where == shard]
        assert sum(sizes[name] for name in held) <= shard_bytes or len(held) == 1
        with Checkpoint.open(index.parent / shard) as one:
            assert set(one.tensors) == set(held) and one.metadata == made


def test_shards_open_in_safetensors(files: Files) -> None:
    from safetensors.numpy import load_file

    index = sharded(files)
    expected = toys.load(index)
    for name, shard in json.loads(index.read_text())["weight_map"].items():
        np.testing.assert_array_equal(load_file(index.parent / shard)[name], expected[name])


@pytest.mark.parametrize("which", [(True, False, False), (False, True, False), (True, True, True)])
def test_sharded_and_single_inputs_merge_alike_into_shards(files: Files, which: tuple[bool, ...]) -> None:
    files.merge("ties")
    inputs = []
    for number, (path, cut) in enumerate(zip((files.start, *files.paths), which)):
        place = files.room / "in" / f"{number}.safetensors"
        if cut:
            path = merge("average", {}, None, [path], place, shard_bytes=64).out
            assert path.name.endswith(".index.json")
        inputs.append(path)
    report = merge("ties", {}, inputs[0], inputs[1:], files.room / "out" / "m.safetensors", shard_bytes=90)
    assert same(report.out, files.out)


def test_fold_and_advance_write_shards_too(files: Files) -> None:
    for folder, size in (("single", None), ("cut", 80)):
        out = files.room / folder
        fold("ties", {}, files.start, *files.paths, out / "fold.safetensors", shard_bytes=size)
        advance("ties", {}, files.start, files.paths[0], out / "stream.safetensors", expert_id="a", state_in=None,
                state_out=files.room / "state.safetensors", shard_bytes=size)  # fmt: skip
    for name in ("fold", "stream"):
        assert same(
            files.room / "cut" / f"{name}.safetensors.index.json",
            files.room / "single" / f"{name}.safetensors",
        )


def test_a_model_that_fits_stays_one_file_and_replaces_the_shards(files: Files) -> None:
    index = sharded(files)
    single = sharded(files, 10**9)
    assert single.name == "m.safetensors" and listed(single) == ["m.safetensors"]
    assert sharded(files) == index and "m.safetensors" not in listed(index)
    before = listed(index)
    assert sharded(files, 40) == index and not set(listed(index)) & set(before) - {INDEX}


def test_an_index_name_asks_for_an_index_at_any_size(files: Files) -> None:
    files.merge("ties")
    index = sharded(files, None, INDEX)
    assert listed(index) == ["m-00001-of-00001.safetensors", INDEX] and same(index, files.out)


def test_directories_get_shards_beside_their_configuration(files: Files) -> None:
    toys.save(files.room / "base" / WEIGHTS_FILE, files.base)
    (files.room / "base" / CONFIG_FILE).write_text("{}")
    files.merge("ties")
    out = files.room / "merged"
    for size in (None, 80):  # shards replace the single file that a directory would otherwise be read from
        report = merge("ties", {}, files.room / "base", files.paths, out, shard_bytes=size)
        assert report.out == out and same(out, files.out)
    assert (out / CONFIG_FILE).is_file() and not (out / WEIGHTS_FILE).exists()
    assert (out / f"{WEIGHTS_FILE}.index.json").is_file()


KILL = """
import sys
from merge_service.merge import merge
base, out, *experts = sys.argv[1:]
merge("average", {}, base, experts, out, shard_bytes=80)
"""


def killed_at(files: Files, where: str, at: int) -> Path:
    """A merge of other experts into the same name, killed at a point."""
    out, marker = files.room / "out" / "m.safetensors", files.room / f"{where}-{at}"
    plan = {where: {"at": at, "marker": str(marker)}}
    answer = subprocess.run(
        [sys.executable, "-c", KILL, files.start, out, *files.paths],
        env=os.environ | {"TEMPORAL_MERGE_FAULTS": json.dumps(plan)}, cwd=Path(__file__).parents[3], timeout=120,
    )  # fmt: skip
    assert answer.returncode == -signal.SIGKILL
    return out


def test_killed_before_anything_is_renamed_the_old_model_stays_and_the_next_merge_cleans_up(
    files: Files,
) -> None:
    files.merge("ties")
    index = sharded(files)
    before = listed(index)
    killed_at(files, "shards.settled", 1)
    assert same(index, files.out) and len(listed(index)) > len(before)
    sharded(files)
    assert listed(index) == before and same(index, files.out)


@pytest.mark.parametrize(
    ("where", "at"), [("shards.published", 1), ("shards.published", 2), ("shards.before_index", 1)]
)
def test_killed_between_renames_no_index_points_at_a_mixture(files: Files, where: str, at: int) -> None:
    files.merge("ties")
    index = sharded(files)
    before = listed(index)
    killed_at(files, where, at)
    assert not index.exists()
    with pytest.raises(CheckpointError):
        Checkpoint.open(index.parent)
    assert sharded(files) == index and listed(index) == before and same(index, files.out)


def test_killed_while_shards_are_made_the_old_model_stays_and_the_merge_goes_on(files: Files) -> None:
    files.merge("ties")
    index = sharded(files)
    before = listed(index)
    killed_at(files, "shards.made", 2)
    assert same(index, files.out) and len(list(index.parent.glob(".m.*.parts/*.json"))) == 2
    (room,) = index.parent.glob(".m.*.parts")
    stamps = {one.name: one.stat().st_ino for one in room.glob("*.safetensors")}
    merge("average", {}, files.start, files.paths, index.with_name("m.safetensors"), shard_bytes=80)
    made = {one.name: one.stat().st_ino for one in index.parent.glob("m-*.safetensors")}
    assert stamps.items() <= made.items() and not list(index.parent.glob(".m.*"))
    assert listed(index) == before


def test_shard_without_its_index_is_not_taken_for_a_model(files: Files) -> None:
    room = killed_at(files, "shards.published", 1).parent
    (only,) = room.glob("*.safetensors")
    assert only.name.startswith("m-00001-of-")
    with pytest.raises(CheckpointError, match="not their index"):
        Checkpoint.open(room)


def test_leftovers_of_the_dead_are_removed_and_of_the_living_and_of_others_are_not(files: Files) -> None:
    room = files.room
    dead = owner_mark().rpartition("-")[0] + "-1.0123.tmp"
    mine = f"{owner_mark()}.0123.tmp"
    gone = [
        f".{name}.{dead}"
        for name in (
            "out.safetensors",
            "out-00002-of-00003.safetensors",
            "out.safetensors.index.json",
            "out.safetensors.limits.json",
        )
    ]
    kept = [
        f".out.safetensors.{mine}",
        f".other.safetensors.{dead}",
        ".out.safetensors.0123456789ab-7-1.ff.tmp",
        f".xout.safetensors.{dead}",
    ]
    for name in (*gone, *kept):
        (room / name).write_text("")
    files.merge("average")
    left = {path.name for path in room.iterdir()}
    assert not left & set(gone) and set(kept) <= left


def test_sizes_are_decimal_and_nonsense_is_refused(files: Files) -> None:
    assert [bytes_of(text) for text in ("5GB", "500 mb", "1.5KB", "12", "2tb")] == [
        5 * 10**9,
        5 * 10**8,
        1500,
        12,
        2 * 10**12,
    ]
    for text in ("", "GB", "0", "-5GB", "5GiB", "5 apples", "1e9"):
        with pytest.raises(CheckpointError, match="write for instance 5GB"):
            bytes_of(text)
    many = {f"w{i}": ("F32", (4,)) for i in range(MOST + 1)}
    with pytest.raises(CheckpointError, match=f"{MOST + 1} files, more than {MOST}"):
        split(many, 16)
    with pytest.raises(CheckpointError, match="hold nothing"):
        sharded(files, 0)
    assert not (files.room / "out").exists()


def test_failed_merge_leaves_no_shards(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "merge_service.merging.in_shards.copy", lambda *_: (_ for _ in ()).throw(RuntimeError)
    )
    with pytest.raises(RuntimeError):
        sharded(files)
    assert not list((files.room / "out").iterdir())


@pytest.mark.parametrize("how", [merge, fold, advance])
def test_one_file_takes_the_place_of_shards_of_its_name_however_it_is_asked_for(
    how: object, files: Files
) -> None:
    index = sharded(files)
    foreign = toys.save(index.with_name("other-00001-of-00002.safetensors"), {"w": toys.vector([1])})
    out = index.with_name("m.safetensors")
    if how is fold:
        fold("average", {}, files.start, *files.paths, out)
    elif how is advance:
        state = {"state_in": None, "state_out": files.room / "s.safetensors"}
        advance("average", {}, files.start, files.paths[0], out, expert_id="a", **state)
    else:
        merge("average", {}, files.start, files.paths, out)
    assert listed(out) == sorted([out.name, foreign.name])
    foreign.unlink()
    assert same(out.parent, out)


def test_crash_before_one_file_has_its_name_leaves_no_index_of_what_was_there(files: Files) -> None:
    index, marker = sharded(files), files.room / "marker"
    code = (
        "import sys; from merge_service.merge import merge; "
        "merge('average', {}, sys.argv[1], sys.argv[2:4], sys.argv[4])"
    )
    fault = {"single.before_publish": {"marker": str(marker)}}
    answer = subprocess.run(
        [sys.executable, "-c", code, files.start, *files.paths, index.with_name("m.safetensors")],
        env={**os.environ, "TEMPORAL_MERGE_FAULTS": json.dumps(fault)}, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert answer.returncode == -signal.SIGKILL and marker.exists() and not index.exists()


def test_hundred_shards_are_written_and_read_with_few_files_open(files: Files) -> None:
    rng = np.random.default_rng(0)
    model = {f"w{i:03}": rng.normal(size=3).astype(np.float32) for i in range(100)}
    paths = [toys.save(files.room / f"{i}.safetensors", model) for i in range(2)]
    code = (
        "import resource, sys; from merge_service.merge import merge; "
        "resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32)); "
        "merge('average', {}, None, sys.argv[1:2], sys.argv[3], shard_bytes=12, threads=4); "
        "merge('average', {}, None, [sys.argv[3] + '.index.json', sys.argv[2]], sys.argv[4])"
    )
    out = files.room / "again.safetensors"
    answer = subprocess.run(
        [sys.executable, "-c", code, *paths, files.room / "cut" / "m.safetensors", out],
        cwd=Path(__file__).parents[3], capture_output=True, text=True,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    assert len(listed(files.room / "cut" / "m.safetensors")) == 101
    for name, value in toys.load(out).items():
        np.testing.assert_array_equal(value, model[name])
