"""Shards are written reproducibly, described without torch, and refused by name if they are damaged."""

import io
import json
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from merge_service.errors import UserError
from workers.data import manifest
from workers.data.manifest import ShardError, describe, verify
from workers.data.writer import Sample, encode_png, write_dataset


def pictures(count: int, classes: int = 3, size: int = 8) -> list[Sample]:
    draw = np.random.default_rng(7)
    return [Sample(draw.integers(0, 255, (size, size, 3), dtype=np.uint8), i % classes) for i in range(count)]


def write(root: Path, name: str = "toys", count: int = 20, shard_samples: int = 8) -> Path:
    write_dataset(
        root / name, kind="classification", classes=["ant", "bee", "cat"], templates=["a toy {c}"],
        splits={"train": pictures(count), "test": pictures(5)}, shard_samples=shard_samples,
    )  # fmt: skip
    return root / name


def files(home: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(home)): path.read_bytes() for path in sorted(home.rglob("*")) if path.is_file()
    }


def foreign(home: Path) -> None:
    (home / manifest.MANIFEST_FILE).unlink()


def add_member(shard: Path, name: str, data: bytes = b"x", **fields: object) -> None:
    with tarfile.open(shard, "a") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        for field, value in fields.items():
            setattr(info, field, value)
        archive.addfile(info, io.BytesIO(data) if info.isreg() else None)


def restate(home: Path) -> None:
    """A manifest that is right about bytes and sha256, so that only the members can be at fault."""
    body = json.loads((home / manifest.MANIFEST_FILE).read_text())
    for split, shards in body["splits"].items():
        for shard in shards:
            path = home / split / shard["file"]
            shard |= {"sha256": manifest.file_sha256(path), "bytes": path.stat().st_size}
    (home / manifest.MANIFEST_FILE).write_text(json.dumps(body))


def test_writing_twice_gives_identical_bytes(tmp_path: Path) -> None:
    first, second = files(write(tmp_path / "one")), files(write(tmp_path / "two"))
    assert first == second
    assert set(first) >= {
        "train/0.tar",
        "train/2.tar",
        "train/nshards.txt",
        "test/0.tar",
        "classnames.txt",
        "manifest.json",
    }


def test_describe_tells_classes_prompts_splits_and_counts(tmp_path: Path) -> None:
    write(tmp_path)
    info = describe(tmp_path, "toys")
    assert (info.kind, info.classes, info.templates) == (
        "classification",
        ("ant", "bee", "cat"),
        ("a toy {c}",),
    )
    assert {name: split.samples for name, split in info.splits.items()} == {"train": 20, "test": 5}
    assert [shard.samples for shard in info.splits["train"].shards] == [8, 8, 4]
    verify(tmp_path, "toys", "train")
    verify(tmp_path, "toys", "test")


def test_describe_needs_neither_torch_nor_webdataset(tmp_path: Path) -> None:
    write(tmp_path)
    code = (
        "import sys; from workers.data.manifest import describe, verify; "
        f"describe({str(tmp_path)!r}, 'toys'); verify({str(tmp_path)!r}, 'toys', 'train'); "
        "assert not {'torch', 'ray', 'mlflow', 'webdataset'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_digest_changes_with_prompts_and_not_with_place(tmp_path: Path) -> None:
    home = write(tmp_path / "one")
    write(tmp_path / "two")
    before = describe(tmp_path / "one", "toys").digest
    assert before == describe(tmp_path / "two", "toys").digest
    (home / "zeroshot_classification_templates.txt").write_text("a drawing of a {c}\n")
    assert describe(tmp_path / "one", "toys").digest != before


def refused(root: Path, split: str = "train", cache: Path | None = None) -> ShardError:
    with pytest.raises(ShardError) as caught:
        verify(root, "toys", split, cache)
    assert "0.tar" in str(caught.value) and caught.value.reason in str(caught.value)
    return caught.value


@pytest.mark.fault("F24")
@pytest.mark.parametrize("keep", ["boundary", "middle", "nothing"])
@pytest.mark.parametrize("with_manifest", [True, False])
def test_cut_shard_is_refused(tmp_path: Path, keep: str, with_manifest: bool) -> None:
    home = write(tmp_path)
    shard = home / "train" / "0.tar"
    with tarfile.open(shard) as archive:
        third = archive.getmembers()[4]
    shard.write_bytes(
        shard.read_bytes()[: {"boundary": third.offset, "middle": third.offset_data + 9, "nothing": 0}[keep]]
    )
    if not with_manifest:
        foreign(home)
    assert refused(tmp_path, cache=tmp_path / "cache").reason == "cut"


@pytest.mark.fault("F24")
@pytest.mark.parametrize("with_manifest", [True, False])
def test_flipped_header_byte_is_refused(tmp_path: Path, with_manifest: bool) -> None:
    home = write(tmp_path)
    shard = home / "train" / "0.tar"
    with tarfile.open(shard) as archive:
        place = archive.getmembers()[6].offset + 3
    data = bytearray(shard.read_bytes())
    data[place] ^= 1
    shard.write_bytes(data)
    if not with_manifest:
        foreign(home)
    assert refused(tmp_path, cache=tmp_path / "cache").reason == "flipped"


@pytest.mark.fault("F24")
def test_flipped_pixel_byte_is_refused_by_sha256(tmp_path: Path) -> None:
    shard = write(tmp_path) / "train" / "0.tar"
    data = bytearray(shard.read_bytes())
    data[512 + 60] ^= 1
    shard.write_bytes(data)
    assert refused(tmp_path).reason == "flipped"


@pytest.mark.fault("F24")
def test_short_shard_is_refused(tmp_path: Path) -> None:
    home = write(tmp_path)
    body = json.loads((home / manifest.MANIFEST_FILE).read_text())
    body["splits"]["train"][0]["samples"] = 9
    (home / manifest.MANIFEST_FILE).write_text(json.dumps(body))
    error = refused(tmp_path)
    assert error.reason == "short" and "8 samples" in str(error) and "9" in str(error)


@pytest.mark.fault("F24")
def test_missing_shard_is_refused(tmp_path: Path) -> None:
    home = write(tmp_path)
    (home / "train" / "0.tar").unlink()
    assert refused(tmp_path).reason == "missing"
    foreign(home)
    with pytest.raises(ShardError, match=r"nshards\.txt states 3 shards, the folder holds 2"):
        describe(tmp_path, "toys", tmp_path / "cache")


@pytest.mark.fault("F22", "F23")
@pytest.mark.parametrize(
    "name",
    [
        "a.pkl",
        "a.pyd",
        "a.pth",
        "a.pyd.gz",
        "a.npy",
        "a.pickle",
        "plain",
        "../../x.png",
        "/abs.png",
        "n" * 1200 + ".png",
        "a.b.png",
    ],
)
@pytest.mark.parametrize("with_manifest", [True, False])
def test_forbidden_member_is_refused(tmp_path: Path, name: str, with_manifest: bool) -> None:
    home = write(tmp_path)
    add_member(home / "train" / "0.tar", name)
    restate(home) if with_manifest else foreign(home)
    assert refused(tmp_path, cache=tmp_path / "cache").reason == "forbidden"


@pytest.mark.fault("F23")
@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE]
)
def test_member_that_is_no_regular_file_is_refused(tmp_path: Path, kind: bytes) -> None:
    home = write(tmp_path)
    add_member(home / "train" / "0.tar", "s9999999.png", b"", type=kind, linkname="/etc/passwd")
    restate(home)
    assert refused(tmp_path).reason == "forbidden"


@pytest.mark.fault("F23")
def test_sample_that_appears_twice_is_refused(tmp_path: Path) -> None:
    home = write(tmp_path)
    add_member(home / "train" / "0.tar", "s0000001.png", encode_png(pictures(1)[0].image))
    restate(home)
    assert refused(tmp_path).reason == "duplicate"


@pytest.mark.fault("F24")
@pytest.mark.parametrize("suffixes", [("png",), ("cls",), ("png", "jpg", "cls")])
def test_incomplete_sample_is_refused(tmp_path: Path, suffixes: tuple[str, ...]) -> None:
    home = write(tmp_path)
    for suffix in suffixes:
        add_member(home / "train" / "0.tar", f"t1.{suffix}", encode_png(pictures(1)[0].image))
    restate(home)
    assert refused(tmp_path).reason == "unreadable"


@pytest.mark.fault("F24")
def test_pixel_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    home = write(tmp_path)
    header = b"IHDR" + (50_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    bomb = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big")
    bomb += (0).to_bytes(4, "big") + b"IDAT" + zlib.crc32(b"IDAT").to_bytes(4, "big")
    add_member(home / "train" / "0.tar", "t1.png", bomb)
    add_member(home / "train" / "0.tar", "t1.cls", b"0")
    restate(home)
    assert refused(tmp_path).reason == "pixels"


def test_pax_and_gnu_long_names_are_read(tmp_path: Path) -> None:
    home = write(tmp_path)
    for number, style in enumerate([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]):
        name = f"folder/{'k' * 150}{number}"
        with tarfile.open(home / "train" / "0.tar", "a", format=style) as archive:
            for suffix, data in (("png", encode_png(pictures(1)[0].image)), ("cls", b"1")):
                info = tarfile.TarInfo(f"{name}.{suffix}")
                info.size, info.mtime = len(data), 1.5
                archive.addfile(info, io.BytesIO(data))
    foreign(home)
    assert describe(tmp_path, "toys", tmp_path / "cache").splits["train"].samples == 22


def test_foreign_root_equals_our_own_in_digest_and_is_indexed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = describe(write(tmp_path / "own").parent, "toys")
    home = write(tmp_path / "foreign", name="wds_toys")
    foreign(home)
    cache = tmp_path / "cache"
    assert describe(tmp_path / "foreign", "toys", cache).splits == own.splits
    verify(tmp_path / "foreign", "toys", "train", cache)
    before = files(home)
    monkeypatch.setattr(manifest, "inspect", lambda *_: pytest.fail("indexed again"))
    assert describe(tmp_path / "foreign", "toys", cache).digest == own.digest
    assert files(home) == before


def test_changed_foreign_shard_changes_the_digest(tmp_path: Path) -> None:
    home = write(tmp_path)
    foreign(home)
    before = describe(tmp_path, "toys", tmp_path / "cache").digest
    write(tmp_path / "more", count=24)
    (home / "train" / "2.tar").write_bytes((tmp_path / "more" / "toys" / "train" / "2.tar").read_bytes())
    assert describe(tmp_path, "toys", tmp_path / "cache").digest != before


@pytest.mark.fault("F24")
def test_verification_is_remembered_until_the_shard_changes(tmp_path: Path) -> None:
    shard = write(tmp_path) / "train" / "0.tar"
    verify(tmp_path, "toys", "train", tmp_path / "cache")
    data = bytearray(shard.read_bytes())
    data[600] ^= 1
    shard.write_bytes(data)
    assert refused(tmp_path, cache=tmp_path / "cache").reason == "flipped"


@pytest.mark.parametrize(
    ("dataset", "split", "says"),
    [
        ("tois", "train", "there are: toys"),
        ("toys", "val", "it has: test, train"),
        ("../toys", "train", "not a valid dataset name"),
    ],
)
def test_wrong_name_is_a_user_error_that_tells_what_exists(
    tmp_path: Path, dataset: str, split: str, says: str
) -> None:
    write(tmp_path)
    with pytest.raises(UserError, match=says):
        verify(tmp_path, dataset, split)


def test_retrieval_set_needs_captions_and_no_class_names(tmp_path: Path) -> None:
    samples = [Sample(sample.image, captions=("a red toy", "a toy")) for sample in pictures(4)]
    write_dataset(tmp_path / "pairs", kind="retrieval", classes=[], templates=[], splits={"test": samples})
    info = describe(tmp_path, "pairs")
    assert (info.kind, info.classes, info.templates, info.splits["test"].samples) == ("retrieval", (), (), 4)
    verify(tmp_path, "pairs", "test")


def test_suite_without_a_role_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no suite\.json"):
        manifest.read_suite(tmp_path)
    (tmp_path / "suite.json").write_text(json.dumps({"name": "x", "roles": {"adaptation": []}}))
    with pytest.raises(UserError, match="pretraining, adaptation, held_out"):
        manifest.read_suite(tmp_path)


def test_description_follows_the_files_it_was_read_from(tmp_path: Path) -> None:
    home = write(tmp_path)
    before = describe(tmp_path, "toys")
    assert describe(tmp_path, "toys") is before
    (home / "classnames.txt").write_text("ant\nbee\ncow\n")
    assert describe(tmp_path, "toys").classes == ("ant", "bee", "cow")
    (home / "zeroshot_classification_templates.txt").unlink()
    assert describe(tmp_path, "toys").templates == ("a photo of a {c}.",)
