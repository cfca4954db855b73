"""A cache entry is complete or absent, damage is detected, and exactly the users who may read the data may read it."""

import multiprocessing
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from merge_service.errors import UserError
from tests.workers.data_helpers import write_coloured
from workers.data import cache as cache_module
from workers.data import decode
from workers.data.cache import (
    ENTRY_FILE,
    Access,
    is_writable,
    make_folder,
    only_one,
    recall,
    remember,
    whole_folder,
)
from workers.data.decode import CONTENT_FILES, load
from workers.jobs import Source


@pytest.fixture(autouse=True)
def _nothing_is_mapped() -> Iterator[None]:
    decode._mapped.cache_clear()
    yield
    decode._mapped.cache_clear()


def entry(cache: Path) -> Path:
    (found,) = (path for path in (cache / "decoded").iterdir() if path.is_dir())
    return found


@pytest.mark.parametrize("name", [*CONTENT_FILES, ENTRY_FILE])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "zeros"])
def test_damaged_entry_is_found_and_decoded_again(
    tmp_path: Path, name: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, cache = write_coloured(tmp_path, "toys", 25), tmp_path / "cache"
    good = np.array(load(source, 8, cache).images)
    file = entry(cache) / name
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
    file.write_bytes({"flip": data, "cut": data[:-1], "gone": b"", "zeros": bytes(len(data))}[damage])
    if damage == "gone":
        file.unlink()
    decode._mapped.cache_clear()
    again = load(source, 8, cache)
    assert np.array_equal(again.images, good) and "decoded again" in capsys.readouterr().err
    assert list(again.labels) == [i % 3 for i in range(25)] and again.texts(1)[0] == "a toys 1"


def test_entry_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    sync, rename = os.fsync, Path.rename

    def traced_sync(handle: int) -> None:
        done.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        sync(handle)

    def traced_rename(path: Path, target: Any) -> Any:
        done.append(f"rename {Path(target).name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", traced_sync)
    monkeypatch.setattr(Path, "rename", traced_rename)
    source = write_coloured(tmp_path, "toys", 5)
    load(source, 8, tmp_path / "cache")
    place = entry(tmp_path / "cache")
    at = done.index(f"rename {place.name}")
    assert {*CONTENT_FILES, ENTRY_FILE} < set(done[:at]) and done[at - 1].startswith(f"{place.name}.partial-")
    assert "decoded" in done[at + 1 :]


@pytest.mark.parametrize(("root", "folder", "file"), [(0o755, 0o755, 0o644), (0o750, 0o750, 0o640), (0o700, 0o700, 0o600), (0o775, 0o775, 0o664)])  # fmt: skip
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o000])
def test_entry_has_the_permissions_of_the_data_root(
    tmp_path: Path, root: int, folder: int, file: int, umask: int
) -> None:
    source = write_coloured(tmp_path / "data", "toys", 5)
    for path in (tmp_path / "data").rglob("*"):
        path.chmod(0o777 if path.is_dir() else 0o666)
    (tmp_path / "data").chmod(root)
    before = os.umask(umask)
    try:
        load(source, 8, tmp_path / "cache")
    finally:
        os.umask(before)
    made = [tmp_path / "cache", *(tmp_path / "cache").rglob("*")]
    assert len(made) > 8
    for path in made:
        assert stat.S_IMODE(path.stat().st_mode) == (folder if path.is_dir() else file), path


def test_entry_of_a_closed_dataset_is_closed(tmp_path: Path) -> None:
    source = write_coloured(tmp_path, "toys", 5)
    tmp_path.chmod(0o755)
    (tmp_path / "toys").chmod(0o700)
    load(source, 8, tmp_path / "cache")
    place = entry(tmp_path / "cache")
    assert [stat.S_IMODE(path.stat().st_mode) for path in (place, place.parent)] == [0o700, 0o755]


def test_group_that_cannot_be_had_gets_what_everybody_gets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise PermissionError("not a member")

    monkeypatch.setattr(os, "chown", refused)
    (tmp_path / "x").touch()
    Access(0o750, tmp_path.stat().st_gid + 1, 0o755).grant(tmp_path / "x")
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o600


def _as_nobody(work: Any, answer: Any) -> None:
    try:
        os.setgid(65534)
        os.setuid(65534)
        answer.put(work())
    except Exception as error:
        answer.put(error)


def as_nobody(work: Any) -> Any:
    """What `work` answers, or the error it raises, in a process of another user."""
    context = multiprocessing.get_context("fork")
    answer = context.SimpleQueue()
    process = context.Process(target=_as_nobody, args=(work, answer))
    process.start()
    process.join()
    got = answer.get()
    if isinstance(got, Exception):
        raise got
    return got


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """A folder that every user can reach (pytest's own are closed)."""
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    place = Path("/tmp") / f"shared-{os.getpid()}-{tmp_path.name}"
    place.mkdir(mode=0o755)
    place.chmod(0o755)
    yield place
    shutil.rmtree(place)


def test_another_user_of_the_root_reads_the_cache_and_is_told_when_it_must_be_written(shared: Path) -> None:
    before = os.umask(0o022)
    try:
        source = write_coloured(shared, "toys", 5)
    finally:
        os.umask(before)
    load(source, 8, shared / "cache")
    decode._mapped.cache_clear()
    assert as_nobody(lambda: len(load(source, 8, shared / "cache"))) == 5
    with pytest.raises(UserError, match=r"cache .*cannot be written .*Permission denied.*set data\.cache"):
        as_nobody(lambda: len(load(source, 6, shared / "cache")))


def test_users_of_a_group_write_one_cache(shared: Path) -> None:
    source = write_coloured(shared / "data", "toys", 5)
    for path in (shared, shared / "data", *(shared / "data").rglob("*")):
        path.chmod(0o775 if path.is_dir() else 0o664)
        os.chown(path, -1, 65534)
    load(source, 8, shared / "cache")
    decode._mapped.cache_clear()
    assert as_nobody(lambda: [len(load(source, size, shared / "cache")) for size in (8, 6)]) == [5, 5]
    decode._mapped.cache_clear()
    assert len(load(source, 6, shared / "cache")) == 5


def test_folder_of_a_process_that_was_killed_is_swept_and_one_that_is_being_filled_is_not(
    tmp_path: Path,
) -> None:
    source, cache = write_coloured(tmp_path, "toys", 5), tmp_path / "cache"
    access, decoded = Access.of(tmp_path), cache / "decoded"
    make_folder(decoded, access)
    (decoded / "gone-train-0.partial-abc").mkdir()
    (decoded / ".gone-train-0.lock").touch()
    with only_one(decoded / "busy-train-0", access), whole_folder(decoded / "busy-train-0", access) as busy:
        load(source, 8, cache)
        assert busy.is_dir() and not list(decoded.glob("gone*.partial-*"))
    assert (decoded / "busy-train-0").is_dir() and not list(decoded.glob("*.partial-*"))


def test_partial_folder_of_the_entry_itself_is_swept(tmp_path: Path) -> None:
    source, cache = write_coloured(tmp_path, "toys", 5), tmp_path / "cache"
    load(source, 8, cache)
    place = entry(cache)
    place.rename(place.with_name(f"{place.name}.partial-xyz"))
    decode._mapped.cache_clear()
    load(source, 8, cache)
    assert entry(cache) == place


def test_full_disk_is_said_with_the_key_to_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    source = write_coloured(tmp_path, "toys", 5)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"No space left on device.*data\.cache.*960 bytes of toys"):
        load(source, 8, tmp_path / "cache")
    assert not list((tmp_path / "cache" / "decoded").glob("*/"))


def test_what_cannot_be_kept_is_found_out_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    access = Access.of(tmp_path)
    remember(tmp_path / "a" / "b.json", "1", access)
    assert recall(tmp_path / "a" / "b.json") == "1" and recall(tmp_path / "a" / "c.json") is None
    (tmp_path / "file").touch()
    remember(tmp_path / "file" / "b.json", "1", access)
    assert recall(tmp_path / "file" / "b.json") is None and not is_writable(tmp_path / "file" / "deep")
    assert is_writable(tmp_path / "not" / "yet" / "there")


def test_place_without_locks_leaves_what_others_are_making(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(cache_module.fcntl, "flock", none)
    (tmp_path / "x.partial-abc").mkdir()
    with only_one(tmp_path / "x", Access.of(tmp_path)):
        assert (tmp_path / "x.partial-abc").is_dir()


def test_samples_of_one_picture_have_its_number_in_common(tmp_path: Path) -> None:
    from tests.workers.data.test_contents import dataset, encode

    one, two = encode(size=8), encode(size=8, seed=1)
    dataset(
        tmp_path / "pairs", [{"png": data, "txt": b"a"} for data in (one, two, one, two)], kind="retrieval"
    )
    samples = load(Source(str(tmp_path), "pairs", "test"), 8, tmp_path / "cache")
    assert list(samples.pictures) == [0, 1, 0, 1]
