"""Hostile or damaged shards: refused by name before training, with nothing run, nothing written, and little memory used."""

import io
import json
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from merge_service.errors import UserError
from tests.faults import poison
from tests.faults.corpus_files import shards
from tests.faults.fuzz import seeded
from tests.faults.limits import cost_of
from tests.workers.data_helpers import PREPROCESS, batch, job, words, write_coloured
from workers.data import manifest
from workers.data.batches import Batches
from workers.data.decode import load
from workers.data.manifest import MANIFEST_FILE, ShardInfo, describe, verify, write_manifest
from workers.data.mixture import batch_indices
from workers.data.tarscan import ShardError
from workers.jobs import Source

SEEDED = seeded(150)
Record = Callable[[str, object], None]
POISONS = poison.poisons()


def dataset(root: Path, data: bytes, samples: int = 3, own: bool = True) -> Source:
    """A dataset of one shard; its manifest, if it has one, is right about every byte, so that only the content can be wrong."""
    home = root / "toys"
    shutil.rmtree(home, ignore_errors=True)
    (home / "train").mkdir(parents=True)
    (home / manifest.CLASSES_FILE).write_text("ant\nbee\ncat\n")
    path = home / "train" / "0.tar"
    path.write_bytes(data)
    if own:
        write_manifest(home, {"train": [ShardInfo("0.tar", manifest.file_sha256(path), samples, len(data))]})
    return Source(str(root), "toys", "train")


def everything(place: Path) -> set[Path]:
    return set(place.rglob("*"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder, deep enough that a path that climbs out of it is noticed."""
    inside = tmp_path / "a" / "b" / "c"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    return inside


def warm(place: Path) -> None:
    """Import the picture decoders first, so that their import does not count as time of the first shard."""
    assert (
        len(load(dataset(place / "good", poison.shard(poison.sample("s2"))), 8, place / "good" / "cache"))
        == 3
    )


@pytest.mark.fault("F22", "F23")
def test_64_poisoned_shards_are_refused_by_name_and_nothing_runs_or_is_written(
    place: Path, tmp_path: Path, record_property: Record
) -> None:
    warm(place)
    slowest = 0.0
    for what, (reason, data) in POISONS.items():
        for own in (True, False):
            source = dataset(place / "root", data, own=own)
            before = everything(tmp_path)
            began = time.perf_counter()
            with pytest.raises(ShardError) as caught:
                load(source, 8, place / "cache")
            slowest = max(slowest, time.perf_counter() - began)
            assert caught.value.reason == reason, f"{what}: {caught.value}"
            assert "root/toys/train/0.tar" in str(caught.value) and len(str(caught.value)) < 600, what
            new = {path for path in everything(tmp_path) - before if place / "cache" not in path.parents}
            assert new <= {place / "cache"}, f"{what} wrote {new}"
    assert len(POISONS) == 64 and slowest < 5
    assert not list(tmp_path.rglob(poison.CANARY)) and not Path(f"/etc/{poison.CANARY}").exists()
    record_property("cases", 2 * len(POISONS))
    record_property("slowest shard", f"{slowest:.2f} s")


@pytest.mark.fault("F22")
def test_trap_of_these_tests_would_run_if_it_were_unpickled(place: Path) -> None:
    for suffix in ("pkl", "npy"):
        if suffix == "npy":
            Path("x.npy").write_bytes(poison.trap(suffix))
            np.load("x.npy", allow_pickle=True)
        else:
            pickle.loads(poison.trap(suffix))
        Path(poison.CANARY).unlink()


@pytest.mark.fault("F22", "F23", "F24")
def test_shard_of_the_corpus_is_refused_for_its_reason(place: Path, record_property: Record) -> None:
    for path in shards():
        with pytest.raises(ShardError) as caught:
            load(dataset(place / "root", path.read_bytes(), own=False), 8, place / "cache")
        assert caught.value.reason == path.name.split("-")[0], f"{path.name}: {caught.value}"
    assert not list(place.rglob(poison.CANARY))
    record_property("cases", len(shards()))


URLS = [
    "pipe:touch canary",
    "pipe:touch${IFS}canary",
    "http://127.0.0.1:9/0.tar",
    "file:///etc/passwd",
    "s3://x/0.tar",
    "gs://x",
    "hdfs:0.tar",
    "ais://x",
    "-",
    "::",
]


@pytest.mark.fault("F22")
@pytest.mark.parametrize("url", URLS)
def test_url_is_taken_for_a_path_that_is_not_there_whatever_the_environment_says(
    url: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOPEN_REWRITE", f"{place}=pipe:touch canary;0.tar=pipe:touch canary")
    monkeypatch.setenv("WDS_REWRITE", f"{place}=pipe:touch canary")
    monkeypatch.setenv("WDS_CACHE", str(place / "cached"))
    with pytest.raises(UserError, match=r"does not exist|no dataset"):
        describe(url, "toys")
    with pytest.raises(UserError, match="not a valid dataset name"):
        describe(str(place), url)
    dataset(place / "root", poison.shard())
    path = place / "root" / "toys" / MANIFEST_FILE
    body = json.loads(path.read_text())
    body["splits"]["train"][0]["file"] = url
    path.write_text(json.dumps(body))
    with pytest.raises(UserError, match=r"missing|not a plain file name"):
        load(Source(str(place / "root"), "toys", "train"), 8, place / "cache")
    assert not list(place.rglob("canary")) and not (place / "cached").exists()


# --- F24: damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.fault("F24")
@pytest.mark.parametrize("how", ["cut", "flipped"])
def test_shard_damaged_at_64_places_is_found_before_training(
    how: str, place: Path, record_property: Record
) -> None:
    data = poison.shard(*(poison.sample(f"s{number}") for number in range(2, 12)))
    source, slowest = dataset(place / "root", data, samples=12), 0.0
    verify(source.root, "toys", "train")
    path, chance = place / "root" / "toys" / "train" / "0.tar", np.random.default_rng(6)
    blocks = 512 * chance.choice(len(data) // 512, 16, replace=False)  # the ends of members among them
    for where in [*blocks, *chance.choice(len(data), 48, replace=False)]:
        damaged = bytearray(data[:where] if how == "cut" else data)
        if how == "flipped":
            damaged[where] ^= 1 << int(chance.integers(8))
        path.write_bytes(damaged)
        began = time.perf_counter()
        with pytest.raises(ShardError) as caught:
            load(source, 8, place / "cache")
        slowest = max(slowest, time.perf_counter() - began)
        assert caught.value.reason == how and str(path) in str(caught.value)
    path.write_bytes(data)
    assert len(load(source, 8, place / "cache")) == 12 and slowest < 5
    record_property("cases", 64)
    record_property("slowest shard", f"{slowest:.3f} s")


def encoded(form: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(stream, form)
    return stream.getvalue()


@pytest.mark.fault("F24")
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_image_of_damaged_bytes_decodes_or_is_named(form: str, place: Path, record_property: Record) -> None:
    whole, seen, refused = encoded(form), [], []

    @SEEDED
    @given(
        changes=st.lists(
            st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=4)), min_size=1, max_size=4
        ),
        keep=st.sampled_from([1.0, 1.0, 0.99, 0.5]),
    )
    def check(changes: list[tuple[float, bytes]], keep: float) -> None:
        image = bytearray(whole)
        for where, what in changes:
            start = int(where * len(image))
            image[start : start + len(what)] = what
        data = poison.shard(poison.sample("s2", bytes(image[: int(keep * len(image))])))
        seen.append(data)
        try:
            assert len(load(dataset(place / "root", data), 8, place / "cache")) == 3
        except ShardError as error:
            assert error.reason in ("unreadable", "pixels") and "s2.png" in str(error)
            refused.append(data)

    check()
    assert 0 < len(refused) < len(seen)
    record_property("cases", len(seen))


texts = st.text(max_size=6) | st.sampled_from(["../x", "/etc/passwd", "\0", "\ud800", "0.tar", ".."])
anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.fault("F24")
def test_manifest_of_any_making_is_refused_or_found_right(place: Path, record_property: Record) -> None:
    source, seen = dataset(place / "root", poison.shard(), samples=2), []
    path = place / "root" / "toys" / MANIFEST_FILE
    good = json.loads(path.read_text())["splits"]["train"][0]

    @SEEDED
    @given(
        body=anything | st.builds(
            lambda key, value, extra: {"format": 1, "splits": {"train": [{**good, key: value}], **extra}},
            st.sampled_from([*good, "more"]), anything, st.dictionaries(texts, anything, max_size=1),
        )
    )  # fmt: skip
    def check(body: Any) -> None:
        path.write_text(json.dumps(body))
        seen.append(body)
        try:
            assert len(load(source, 8, place / "cache")) == 2
        except UserError as error:
            assert str(place) in str(error) or "has no split" in str(error)

    check()
    for name, data in {
        MANIFEST_FILE: b"[" * 20_000,
        manifest.CLASSES_FILE: b"\xff\xfe",
        "dataset_type.txt": b"\xff",
    }.items():
        dataset(place / "root", poison.shard(), samples=2)
        (place / "root" / "toys" / name).write_bytes(data)
        with pytest.raises(UserError, match=name):
            describe(source.root, "toys")
    dataset(place / "root", poison.shard(), own=False)
    for stated in ("²", "9" * 5000, "-1", "two"):
        (place / "root" / "toys" / "train" / "nshards.txt").write_text(stated)
        with pytest.raises(UserError, match="states"):
            describe(source.root, "toys", place / "cache")
    record_property("cases", len(seen) + 7)


@pytest.mark.fault("F24")
@pytest.mark.parametrize(
    "index",
    ["", "[", "[]", '{"train/0.tar": 3}', '{"train/0.tar": [1, 2]}', '{"train/0.tar": null}', "[" * 9000],
)
def test_index_of_a_foreign_root_that_was_torn_is_made_again(index: str, place: Path) -> None:
    dataset(place / "root", poison.shard(), own=False)
    before = describe(place / "root", "toys", place / "cache")
    (kept,) = (place / "cache" / "index").iterdir()
    whole = kept.read_text()
    kept.write_text(index)
    assert describe(place / "root", "toys", place / "cache") == before and kept.read_text() == whole


@pytest.mark.fault("F24")
def test_bombs_are_refused_without_memory(place: Path, record_property: Record) -> None:
    bombs = [
        what for what in POISONS if any(word in what for word in ("packed", "50,000", "MB", "size", "10,000"))
    ]
    for what in bombs:
        dataset(place / what, POISONS[what][1])
    many = (poison.member(f"{number}.png", b"") for number in range(10_000))
    dataset(place / "10,000 empty images", poison.shard(*many))
    cost = cost_of("""
from workers.data.manifest import verify
from workers.data.tarscan import ShardError
begin()
slowest = 0
for root in arguments:
    started = time.perf_counter()
    try:
        verify(root, "toys", "train")
        raise SystemExit(f"{root} was taken")
    except ShardError:
        pass
    slowest = max(slowest, time.perf_counter() - started)
end(slowest=slowest)
""", *(path for path in place.iterdir()))  # fmt: skip
    assert len(bombs) >= 8 and cost.grown < 50, f"{cost.grown:.0f} MB"
    assert cost.more["slowest"] < 5
    record_property("cases", len(bombs) + 1)
    record_property("memory", f"{cost.grown:.0f} MB")
    record_property("slowest bomb", f"{cost.more['slowest']:.2f} s")


# --- F25: few samples, many workers --------------------------------------------------------------------------------------


@pytest.mark.fault("F25")
@pytest.mark.parametrize(("samples", "world"), [(1, 2), (3, 4), (11, 2), (11, 3), (11, 4), (21, 6)])
def test_ranks_share_equal_parts_of_every_batch_however_few_and_uneven_the_shards_are(
    samples: int, world: int, tmp_path: Path
) -> None:
    """Shards hold ten samples each, so eleven make one of ten and one of one."""
    asked = job(tmp_path / "cache", [write_coloured(tmp_path, "toys", samples)], batch_size=12)
    alone = Batches(asked, words, PREPROCESS)
    ranks = [Batches(asked, words, PREPROCESS, rank, world) for rank in range(world)]
    for step in range(2 * samples):
        parts = [batch(batches, step)[1].tolist() for batches in ranks]
        assert {len(part) for part in parts} == {12 // world}
        assert sorted(row for part in parts for row in part) == sorted(batch(alone, step)[1].tolist())


@pytest.mark.fault("F25")
def test_batch_is_whole_however_few_samples_there_are(record_property: Record) -> None:
    seen = []

    @SEEDED
    @given(
        batch=st.integers(4, 48), sizes=st.tuples(*[st.integers(1, 20)] * 3), step=st.integers(0, 10**6),
        buffer=st.booleans(),
    )  # fmt: skip
    def check(batch: int, sizes: tuple[int, int, int], step: int, buffer: bool) -> None:
        counts = dict(zip(("pretraining", "update", "buffer"), sizes)) | ({} if buffer else {"buffer": 0})
        rows = batch_indices(step, 3, batch, {"pretraining": 0.33, "update": 0.34, "buffer": 0.33}, counts)
        for name, chosen in rows.items():
            assert all(0 <= row < counts[name] for row in chosen)
        assert sum(len(chosen) for chosen in rows.values()) == batch
        seen.append(batch)

    check()
    record_property("cases", len(seen))
