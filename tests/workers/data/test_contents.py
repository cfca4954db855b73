"""Validation of shards: bad labels, truncated pictures, and the kinds of pictures."""

import io
import struct
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from workers.data.contents import Survey, inspect, together
from workers.data.manifest import describe, verify
from workers.data.seen import content_digest, notes
from workers.data.tarscan import ShardError


def encode(form: str = "PNG", size: int = 64, seed: int = 0, **more: object) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size, 3)).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form, **more)
    return stream.getvalue()


def encode_image(image: Image.Image, form: str = "PNG", **more: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **more)
    return stream.getvalue()


PLAIN = encode(size=8)


def dataset(
    home: Path, samples: list[dict[str, bytes]], kind: str = "classification", classes: int = 3
) -> Path:
    """A foreign dataset whose test split is one shard of these samples."""
    (home / "test").mkdir(parents=True)
    (home / "dataset_type.txt").write_text(f"{kind}\n")
    if kind == "classification":
        (home / "classnames.txt").write_text("".join(f"thing {index}\n" for index in range(classes)))
    with tarfile.open(home / "test" / "0.tar", "w") as archive:
        for index, sample in enumerate(samples):
            for suffix, data in sample.items():
                member = tarfile.TarInfo(f"s{index}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return home / "test" / "0.tar"


@pytest.mark.parametrize(
    "label", [b"two", b"0.0", b"1.5", b"-1", b"+1", b"", b"1,2", b"1e0", "\u0663".encode(), b"1 0", b"9" * 30]
)
def test_label_that_is_no_number_is_refused_with_the_sample(tmp_path: Path, label: bytes) -> None:
    shard = dataset(tmp_path / "toys", [{"png": PLAIN, "cls": b"0"}, {"png": PLAIN, "cls": label}])
    with pytest.raises(ShardError, match=r"sample 's1' has the class .*not a number") as caught:
        describe(tmp_path, "toys", tmp_path / "cache")
    assert caught.value.shard == shard


def test_label_without_a_class_is_refused_with_the_sample_and_the_count(tmp_path: Path) -> None:
    dataset(tmp_path / "toys", [{"png": PLAIN, "cls": label} for label in (b"0", b" 2\n", b"3", b"1")])
    describe(tmp_path, "toys", tmp_path / "cache")
    with pytest.raises(ShardError, match=r"sample 's2' has the class '3'; classnames\.txt holds 3"):
        verify(tmp_path, "toys", "test", tmp_path / "cache")
    (tmp_path / "toys" / "classnames.txt").write_text("a\nb\nc\nd\n")
    found = verify(tmp_path, "toys", "test", tmp_path / "cache")
    assert found.labels == ((0, 1), (1, 1), (2, 1), (3, 1)) and found.top == "s2"


@pytest.mark.parametrize(
    "data", [encode("JPEG"), encode("JPEG", progressive=True), encode("PNG"), encode("WEBP"), encode("WEBP", lossless=True)],
    ids=["jpeg", "progressive", "png", "webp", "lossless"],
)  # fmt: skip
@pytest.mark.parametrize("kept", [0.66, 0.9, 0.99])
def test_picture_cut_in_its_data_is_refused_without_decoding_the_whole_ones(
    tmp_path: Path, data: bytes, kept: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = dataset(tmp_path / "whole", [{"jpg": data, "cls": b"0"}])
    cut = dataset(
        tmp_path / "cut", [{"jpg": data, "cls": b"0"}, {"jpg": data[: int(len(data) * kept)], "cls": b"0"}]
    )
    with pytest.raises(ShardError, match=r"s1\.jpg"):
        inspect(cut, "classification")
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("a whole picture was decoded"))
    if Image.open(io.BytesIO(data)).format != "WEBP":  # which Pillow decodes in order to look at
        assert inspect(whole, "classification").samples == 1


def test_end_of_a_preview_is_not_the_end_of_its_picture(tmp_path: Path) -> None:
    preview = encode("JPEG", size=16)
    data = encode("JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0" + preview)
    assert preview in data
    inspect(dataset(tmp_path / "whole", [{"jpg": data, "cls": b"0"}]), "classification")
    cut = data[: data.index(preview) + len(preview) + 700]
    with pytest.raises(ShardError, match="truncated"):
        inspect(dataset(tmp_path / "cut", [{"jpg": cut, "cls": b"0"}]), "classification")


def test_bytes_behind_the_end_of_a_picture_do_no_harm(tmp_path: Path) -> None:
    samples = [{"jpg": encode(form) + b"\0" * 100, "cls": b"0"} for form in ("JPEG", "PNG", "WEBP")]
    assert inspect(dataset(tmp_path / "toys", samples), "classification").samples == 3


def test_flipped_bit_inside_a_png_is_refused(tmp_path: Path) -> None:
    data = bytearray(encode("PNG"))
    data[len(data) // 2] ^= 4
    with pytest.raises(ShardError, match=r"s0\.png"):
        inspect(dataset(tmp_path / "toys", [{"png": bytes(data), "cls": b"0"}]), "classification")


def odd(kind: str) -> bytes:
    grey = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    exif = Image.Exif()
    exif[0x112] = 6
    clear = np.zeros((8, 8, 4), np.uint8)
    clear[2:4] = 255
    return {
        "16-bit grey": lambda: encode_image(Image.fromarray(grey)),
        "transparent": lambda: encode_image(Image.fromarray(clear)),
        "turned by EXIF": lambda: encode("JPEG", exif=exif),
        "CMYK": lambda: encode_image(Image.new("CMYK", (8, 8)), "JPEG"),
        "animated": lambda: encode("PNG", 8, save_all=True, append_images=[Image.new("RGB", (8, 8))]),
    }[kind]()  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "renamed"),
    [
        ("16-bit grey", True),
        ("transparent", True),
        ("turned by EXIF", True),
        ("CMYK", False),
        ("animated", False),
    ],
)
def test_unusual_pictures_are_counted_and_only_converted_ones_rename_the_content(
    tmp_path: Path, kind: str, renamed: bool
) -> None:
    dataset(tmp_path / "toys", [{"png": PLAIN, "cls": b"0"}, {"png": odd(kind), "cls": b"0"}])
    info, survey = (
        describe(tmp_path, "toys", tmp_path / "cache"),
        verify(tmp_path, "toys", "test", tmp_path / "cache"),
    )
    (said,) = notes(info, {"test": survey})
    assert f"1 of 2 pictures of test are {kind}" in said and "'toys'" in said
    assert (content_digest(info.splits["test"], survey, scored=True) != info.splits["test"].digest) is renamed


def test_plain_split_is_named_by_its_shards_alone_and_says_nothing(tmp_path: Path) -> None:
    dataset(tmp_path / "toys", [{"png": PLAIN, "cls": b"0"}, {"png": PLAIN, "cls": b"1"}])
    info, survey = (
        describe(tmp_path, "toys", tmp_path / "cache"),
        verify(tmp_path, "toys", "test", tmp_path / "cache"),
    )
    assert notes(info, {"test": survey}) == []
    assert content_digest(info.splits["test"], survey, scored=True) == info.splits["test"].digest


def test_captions_of_one_picture_are_said_and_rename_the_content_where_it_is_scored(tmp_path: Path) -> None:
    dataset(tmp_path / "pairs", [{"png": PLAIN, "txt": b"a"}, {"png": PLAIN, "txt": b"b"}], kind="retrieval")
    info, survey = (
        describe(tmp_path, "pairs", tmp_path / "cache"),
        verify(tmp_path, "pairs", "test", tmp_path / "cache"),
    )
    assert "2 samples of test show 1 pictures" in notes(info, {"test": survey})[0]
    split = info.splits["test"]
    assert content_digest(split, survey, scored=True) != split.digest
    assert content_digest(split, survey, scored=False) == split.digest


def test_copies_that_came_in_by_chance_stay_pictures_of_their_own_and_are_said(tmp_path: Path) -> None:
    samples = [{"png": encode(size=8, seed=max(1, seed)), "txt": b"a"} for seed in range(6)]
    dataset(tmp_path / "pairs", samples, kind="retrieval")
    info, survey = (
        describe(tmp_path, "pairs", tmp_path / "cache"),
        verify(tmp_path, "pairs", "test", tmp_path / "cache"),
    )
    assert (
        "2 of 6 samples of test show a picture that another sample also shows"
        in notes(info, {"test": survey})[0]
    )
    assert content_digest(info.splits["test"], survey, scored=True) == info.splits["test"].digest
    assert notes(info, {"test": replace(survey, samples=300)}) == []


def test_name_that_stands_twice_is_said_with_its_lines(tmp_path: Path) -> None:
    dataset(tmp_path / "toys", [{"png": PLAIN, "cls": b"0"}])
    (tmp_path / "toys" / "classnames.txt").write_text("crane\nmissile\ncrane\n")
    info = describe(tmp_path, "toys", tmp_path / "cache")
    assert "'crane' in lines 1, 3" in notes(info, {})[0]


def test_surveys_of_shards_add_up() -> None:
    one = Survey(2, ((0, 1), (4, 1)), "x", (("CMYK", 1),), ("a",))
    two = Survey(3, ((0, 2), (3, 1)), "y", (("CMYK", 2), ("animated", 1)), ("b",))
    assert together([two, one]) == Survey(
        5, ((0, 3), (3, 1), (4, 1)), "x", (("CMYK", 3), ("animated", 1)), ("b", "a")
    )
    assert together([]) == Survey()


def test_second_look_reads_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset(
        tmp_path / "pairs", [{"png": PLAIN, "txt": b"a"}, {"png": odd("CMYK"), "txt": b"b"}], kind="retrieval"
    )
    first = verify(tmp_path, "pairs", "test", tmp_path / "cache")
    monkeypatch.setattr("workers.data.manifest.inspect", lambda *_: pytest.fail("read again"))
    assert verify(tmp_path, "pairs", "test", tmp_path / "cache") == first and first.pictures == (("CMYK", 1),)


def broken_inside() -> bytes:
    """A PNG whose chunks are whole and whose pixels are not: only decoding finds that."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", 64, 64, 8, 0, 0, 0, 0)
    rows = zlib.compress(np.random.default_rng(0).bytes(64 * 65))
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", rows[: len(rows) // 2]) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def test_deep_look_decodes_every_picture(tmp_path: Path) -> None:
    dataset(tmp_path / "toys", [{"png": broken_inside(), "cls": b"0"}])
    verify(tmp_path, "toys", "test", tmp_path / "cache")
    with pytest.raises(ShardError, match="cannot be decoded"):
        verify(tmp_path, "toys", "test", tmp_path / "cache", decode=True)
