"""Encoded splits: their index, the crops of original pictures, and errors that name a damaged sample."""

import io
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import simplejpeg
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from tests.workers.data_helpers import PREPROCESS, job, words
from workers.data import decode
from workers.data.batches import Batches
from workers.data.cache import ENTRY_FILE, file_sha256
from workers.data.contents import samples_in
from workers.data.decode import load
from workers.data.encoded import index, shards
from workers.data.encoded.pictures import Captions, Pictures
from workers.data.manifest import ShardInfo, write_manifest
from workers.data.share import CROP_DRAWS, piece_boxes
from workers.data.tarscan import ShardError
from workers.feed.ring import feed
from workers.jobs import Source

Members = Mapping[str, bytes]


@pytest.fixture(autouse=True)
def _nothing_is_open() -> Iterator[None]:
    for cached in (decode._mapped, decode._stored, shards._opened):
        cached.cache_clear()
    yield
    for cached in (decode._mapped, decode._stored, shards._opened):
        cached.cache_clear()


def encoded(mode: str = "RGB", size: tuple[int, int] = (40, 30), form: str = "JPEG", **options: Any) -> bytes:
    """A picture of noise over a slope, as a file."""
    draw = np.random.default_rng(sum(size))
    slope = np.linspace(0, 200, size[0])[None, :, None] + draw.integers(0, 50, (size[1], size[0], 4))
    stream = io.BytesIO()
    Image.fromarray(slope.astype(np.uint8), "RGBA").convert(mode).save(stream, form, **options)
    return stream.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(size=(50, 20), exif=exif)


def sixteen_bits() -> bytes:
    stream = io.BytesIO()
    values = np.arange(1200, dtype=np.uint32).reshape(30, 40) * 54
    Image.fromarray(values.astype(np.uint16)).save(stream, "PNG")
    return stream.getvalue()


PICTURES = {
    "plain.jpg": encoded(),
    "grey.jpg": encoded("L", (33, 47)),
    "cmyk.jpg": encoded("CMYK", (45, 31)),
    "progressive.jpg": encoded(size=(31, 64), progressive=True),
    "turned.jpg": turned(),
    "photo.png": encoded("RGB", (60, 24), "PNG"),
    "holes.png": encoded("RGBA", (28, 36), "PNG"),
    "deep.png": sixteen_bits(),
    "photo.webp": encoded("RGB", (41, 41), "WEBP"),
}
"""One of each kind."""


def shard_of(path: Path, members: Members, form: int = tarfile.USTAR_FORMAT) -> ShardInfo:
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    samples = sum(name.rpartition(".")[2] in ("jpg", "png", "webp") for name in members)
    return ShardInfo(path.name, file_sha256(path), samples, path.stat().st_size)


def dataset(
    root: Path, *parts: Members, kind: str = "classification", form: int = tarfile.USTAR_FORMAT
) -> Source:
    """A dataset of these shards, to be read as it is stored."""
    home = root / "toys"
    (home / "train").mkdir(parents=True)
    (home / "dataset_type.txt").write_text(kind)
    (home / "classnames.txt").write_text("cat\ndog\n")
    (home / "zeroshot_classification_templates.txt").write_text("a {c}\nthe {c}\n")
    made = [shard_of(home / "train" / f"{number}.tar", part, form) for number, part in enumerate(parts)]
    write_manifest(home, {"train": made})
    return Source(str(root), "toys", "train", reading="encoded")


def labelled(pictures: Members = PICTURES, texts: Mapping[str, str] | None = None) -> dict[str, bytes]:
    """Members of a shard: each picture, its class in turn, and captions where there are some."""
    found: dict[str, bytes] = {}
    for number, (name, data) in enumerate(pictures.items()):
        key = f"{number:03d}-{name.partition('.')[0]}"
        found[f"{key}.{name.partition('.')[2]}"] = data
        found[f"{key}.cls"] = str(number % 2).encode()
        if texts and name in texts:
            found[f"{key}.txt"] = texts[name].encode()
    return found


def test_pictures_of_every_kind_are_those_of_the_decoded_cache_bit_for_bit(tmp_path: Path) -> None:
    turned = dict(reversed(PICTURES.items()))  # shards that differ, so that a row of the other shard is seen
    source = dataset(tmp_path, labelled(), labelled(turned))
    decoded = load(replace(source, reading="decoded"), 24, tmp_path / "cache")
    stored = load(source, 24, tmp_path / "cache")
    assert isinstance(stored.images, Pictures) and stored.images.shape == decoded.images.shape == (
        18,
        24,
        24,
        3,
    )
    assert np.array_equal(stored.images[0:18], decoded.images) and np.array_equal(
        stored.images[7], decoded.images[7]
    )
    assert np.array_equal(stored.labels, decoded.labels) and list(stored.captions) == decoded.captions
    assert [stored.texts(row) for row in (0, 1)] == [decoded.texts(row) for row in (0, 1)]


def test_samples_of_some_classes_are_those_of_the_decoded_cache(tmp_path: Path) -> None:
    source = replace(dataset(tmp_path, labelled(texts={"grey.jpg": "one\ntwo"})), classes=("dog",))
    decoded = load(replace(source, reading="decoded"), 16, tmp_path / "cache")
    stored = load(source, 16, tmp_path / "cache")
    assert len(stored) == 4 and np.array_equal(stored.images[:], decoded.images[:])
    assert list(stored.captions) == decoded.captions == [("one", "two"), (), (), ()]
    assert isinstance(stored.images, Pictures) and stored.images.sizes(np.array([1])).tolist() == [[64, 31]]


def test_copies_in_a_retrieval_split_are_known(tmp_path: Path) -> None:
    members = {}
    for number, name in enumerate(("plain.jpg", "grey.jpg", "plain.jpg", "grey.jpg")):
        members |= {f"{number}.jpg": PICTURES[name], f"{number}.txt": b"words"}
    source = dataset(tmp_path, members, kind="retrieval")
    decoded = load(replace(source, reading="decoded"), 16, tmp_path / "cache")
    stored = load(source, 16, tmp_path / "cache")
    assert np.asarray(stored.pictures).tolist() == decoded.pictures.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("name", ["plain.jpg", "grey.jpg", "progressive.jpg"])
def test_fast_decoder_gives_the_pixels_of_pillow(name: str) -> None:
    expected = np.asarray(Image.open(io.BytesIO(PICTURES[name])).convert("RGB"))
    assert np.array_equal(simplejpeg.decode_jpeg(PICTURES[name], colorspace="RGB"), expected)


def test_piece_is_that_of_open_clips_training_transform(tmp_path: Path) -> None:
    """open_clip crops the picture as a person sees it and resizes bicubically with antialiasing; its last bit may round otherwise."""
    source = dataset(tmp_path, labelled())
    images = load(source, 24, tmp_path / "cache").images
    seen = load(replace(source, reading="decoded"), 24, tmp_path / "cache")
    assert isinstance(images, Pictures) and len(seen) == len(images)
    (resize,) = (
        step for step in open_clip.transform.image_transform_v2(
            open_clip.transform.PreprocessCfg(size=24), is_train=True
        ).transforms if isinstance(step, RandomResizedCrop)
    )  # fmt: skip
    assert resize.interpolation.value == "bicubic"
    for row, (height, width) in enumerate(images.sizes(np.arange(9)).tolist()):
        out = np.empty((24, 24, 3), np.uint8)
        box = (3, 2, height - 4, width - 5)
        images.cut(row, box, out)
        whole = Image.fromarray(images._original(row))
        assert whole.size == (width, height)
        expected = whole.crop((2, 3, width - 3, height - 1)).resize((24, 24), Image.Resampling.BICUBIC)
        assert np.abs(out.astype(int) - np.asarray(expected).astype(int)).max() <= 1


def test_boxes_follow_torchvisions_random_resized_crop() -> None:
    sizes = np.array([[375, 500], [40, 30], [3, 2000], [1, 1]] * 500)
    boxes = piece_boxes(
        np.random.default_rng(1).random((2000, CROP_DRAWS)), sizes, (0.5, 1.0), (3 / 4, 4 / 3)
    )
    top, left, high, wide = boxes.T
    assert (top >= 0).all() and (left >= 0).all() and (high > 0).all() and (wide > 0).all()
    assert (top + high <= sizes[:, 0]).all() and (left + wide <= sizes[:, 1]).all()
    theirs = np.array(
        [
            RandomResizedCrop.get_params(torch.empty(3, 375, 500), [0.5, 1.0], [3 / 4, 4 / 3])
            for _ in range(2000)
        ]
    )
    for column in range(4):
        assert abs(boxes[::4, column].mean() - theirs[:, column].mean()) < 8
    assert (boxes[2::4] == [0, 998, 3, 4]).all() and (boxes[3::4] == [0, 0, 1, 1]).all()


def step(batches: Batches, number: int) -> tuple[Any, np.ndarray]:
    """What a step reads, and its pictures."""
    share = batches.share(number)
    out = np.empty((len(share.rows), *batches.shape[1:]), np.uint8)
    batches.read(share, 0, len(share.rows), out)
    return share, out


def test_batch_is_a_function_of_seed_step_and_rank(tmp_path: Path) -> None:
    source = dataset(tmp_path, labelled(), labelled(texts={"plain.jpg": "some words"}))
    asked = job(tmp_path / "cache", [source], batch_size=8)
    one, other = Batches(asked, words, PREPROCESS), Batches(asked, words, PREPROCESS)
    step(other, 0)
    share, images = step(other, 5)
    again, same = step(one, 5)
    assert np.array_equal(images, same) and np.array_equal(share.tokens, again.tokens)
    assert len(share.boxes) == 0 and (share.pieces[:, 2:] > 0).all()
    for rank in (0, 1):
        _, part = step(Batches(asked, words, PREPROCESS, rank, 2), 5)
        assert np.array_equal(part, images[rank::2])
    assert not np.array_equal(step(one, 6)[1], images)
    assert not np.array_equal(step(Batches(replace(asked, seed=6), words, PREPROCESS), 5)[1], images)


def test_batch_of_both_ways_of_reading_crops_each_picture_once(tmp_path: Path) -> None:
    new, pool = dataset(tmp_path / "a", labelled()), dataset(tmp_path / "b", labelled())
    asked = job(
        tmp_path / "cache", [replace(new, reading="decoded")], pretraining=[pool], mixture=(0.5, 0.5, 0)
    )
    share, _ = step(Batches(asked, words, PREPROCESS), 0)
    cut = share.pieces[:, 2] > 0
    assert cut.sum() == 6 and (share.boxes[cut] == [0, 0, 1, 1]).all() and (share.boxes[~cut, 2] < 1).any()
    plain = job(tmp_path / "cache", [replace(new, reading="decoded")], pretraining=[replace(pool, reading="decoded")],
                mixture=(0.5, 0.5, 0))  # fmt: skip
    before, _ = step(Batches(plain, words, PREPROCESS), 0)
    assert np.array_equal(before.boxes[~cut], share.boxes[~cut]) and np.array_equal(
        before.tokens, share.tokens
    )


def test_any_number_of_threads_feeds_the_same_pictures(tmp_path: Path) -> None:
    source = dataset(tmp_path, labelled(), labelled(), labelled())
    batches = Batches(job(tmp_path / "cache", [source], batch_size=9), words, PREPROCESS)

    def fed(loaders: int) -> list[torch.Tensor]:
        from workers.feed.device import Host

        class Three(Host):
            slots, overlaps = 3, True

        def as_they_are(images: torch.Tensor, boxes: torch.Tensor | None = None) -> torch.Tensor:
            return images.clone()

        return [batch.images for _, batch in feed(batches, as_they_are, Three(), range(6), loaders)]  # type: ignore[arg-type]

    one = fed(1)
    for loaders in (2, 5):
        assert all(torch.equal(a, b) for a, b in zip(one, fed(loaders), strict=True))


def test_texts_are_those_of_the_table_of_a_decoded_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.data.prompts.KEPT", 2)
    source = dataset(tmp_path, labelled(texts={"plain.jpg": "one\ntwo\nthree", "deep.png": "alone"}))
    draws = np.random.default_rng(3).random(40)
    rows = np.random.default_rng(4).integers(0, 9, 40)
    found = []
    for reading in ("decoded", "encoded"):
        samples = load(replace(source, reading=reading), 8, tmp_path / "cache")  # type: ignore[arg-type]
        from workers.data.prompts import prompts

        found.append(prompts(samples, words).pick(rows, draws))
    assert np.array_equal(*found)


def test_index_is_made_once_and_again_when_it_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = dataset(tmp_path, labelled())
    load(source, 8, tmp_path / "cache")
    (place,) = (path for path in (tmp_path / "cache" / "encoded").iterdir() if path.is_dir())
    assert {path.name for path in place.iterdir()} == {*index.FILES, ENTRY_FILE}
    with monkeypatch.context() as patch:
        patch.setattr(index, "_shard", lambda *_: pytest.fail("indexed again"))
        decode._stored.cache_clear()
        load(source, 32, tmp_path / "cache")
    data = bytearray((place / "places.npy").read_bytes())
    data[-1] ^= 1
    (place / "places.npy").write_bytes(data)
    decode._stored.cache_clear()
    assert load(source, 8, tmp_path / "cache").images[3].shape == (8, 8, 3)
    assert "indexed again" in capsys.readouterr().err


def test_shard_that_changed_after_it_was_indexed_is_refused(tmp_path: Path) -> None:
    source = dataset(tmp_path, labelled(), labelled())
    load(source, 8, tmp_path / "cache")
    path = tmp_path / "toys" / "train" / "1.tar"
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)
    decode._stored.cache_clear()
    with pytest.raises(ShardError, match=r"1\.tar: flipped"):
        load(source, 8, tmp_path / "cache")


def test_sample_that_cannot_be_decoded_is_named_with_its_shard(tmp_path: Path) -> None:
    """Its header and its end are whole, so only decoding finds the damage."""
    png = bytearray(PICTURES["photo.png"])
    at = png.index(b"IDAT")
    png[at + 8 : at + 40] = bytes(32)
    import zlib

    size = int.from_bytes(png[at - 4 : at], "big")
    png[at + 4 + size : at + 8 + size] = zlib.crc32(png[at : at + 4 + size]).to_bytes(4, "big")
    source = dataset(
        tmp_path, labelled(), labelled({"good.jpg": PICTURES["plain.jpg"], "bad.png": bytes(png)})
    )
    images = load(source, 8, tmp_path / "cache").images
    assert isinstance(images, Pictures)
    for read in (lambda: images[10], lambda: images.cut(10, (0, 0, 24, 60), np.empty((8, 8, 3), np.uint8))):
        with pytest.raises(ShardError, match=r"1\.tar: unreadable: image '001-bad\.png' cannot be decoded"):
            read()


def test_many_shards_are_open_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from functools import lru_cache

    monkeypatch.setattr(shards, "_opened", lru_cache(maxsize=2)(shards._Open))
    source = dataset(tmp_path, *[labelled({"a.jpg": encoded(size=(20 + n, 20))}) for n in range(6)])
    images = load(source, 8, tmp_path / "cache").images
    assert isinstance(images, Pictures)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for row in (0, 5, 1, 4, 2, 3, 0):
        assert images._original(row).shape == (20, 20 + row, 3)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2


# What users of webdataset, img2dataset and open_clip report, on this reader.


def test_truncated_jpeg_is_named_before_training(tmp_path: Path) -> None:
    """webdataset #206: a picture that ends early stops training hours later, with neither shard nor sample."""
    cut = PICTURES["plain.jpg"][:-200]
    source = dataset(tmp_path, labelled({"good.jpg": PICTURES["grey.jpg"], "cut.jpg": cut}))
    with pytest.raises(ShardError, match=r"0\.tar: unreadable: image '001-cut\.jpg' cannot be decoded"):
        load(source, 8, tmp_path / "cache")


def test_jpeg_with_garbage_between_segments_is_read_as_pillow_reads_it(tmp_path: Path) -> None:
    """libjpeg warns of such files, which are common in pools from the web; viewers show them."""
    plain = PICTURES["plain.jpg"]
    at = plain.index(b"\xff\xdb")
    odd = plain[:at] + bytes(7) + plain[at:]
    with pytest.raises(ValueError):
        simplejpeg.decode_jpeg(odd, colorspace="RGB")
    images = load(dataset(tmp_path, labelled({"odd.jpg": odd})), 8, tmp_path / "cache").images
    assert isinstance(images, Pictures)
    assert np.array_equal(images._original(0), np.asarray(Image.open(io.BytesIO(plain)).convert("RGB")))


def test_repeated_member_is_refused_by_name(tmp_path: Path) -> None:
    """webdataset #157 and #286: two members of one name."""
    home = tmp_path / "toys"
    source = dataset(tmp_path, labelled())
    path = home / "train" / "0.tar"
    with tarfile.open(path, "a", format=tarfile.USTAR_FORMAT) as archive:
        member = tarfile.TarInfo("000-plain.jpg")
        member.size = 4
        archive.addfile(member, io.BytesIO(b"more"))
    write_manifest(home, {"train": [ShardInfo("0.tar", file_sha256(path), 9, path.stat().st_size)]})
    with pytest.raises(ShardError, match=r"duplicate: member '000-plain\.jpg' appears twice"):
        load(source, 8, tmp_path / "cache")


@pytest.mark.parametrize(
    "order",
    [["a.jpg", "b.jpg", "a.cls", "b.cls"], ["a.jpg", "a.cls", "b.jpg", "b.cls", "a.txt"]],
    ids=["all apart", "a caption behind"],
)
def test_members_that_do_not_follow_one_another_are_refused(tmp_path: Path, order: list[str]) -> None:
    """webdataset #407: such samples come out in pieces there."""
    held = {"jpg": PICTURES["plain.jpg"], "cls": b"1", "txt": b"words"}
    source = dataset(tmp_path, {name: held[name[2:]] for name in order})
    with pytest.raises(ShardError, match=r"sample 'a' .*next to each other"):
        load(source, 8, tmp_path / "cache")


@pytest.mark.parametrize("text", [None, b"", b" \n \n"], ids=["no member", "empty", "blank"])
def test_sample_without_a_caption_is_refused_where_captions_are_needed(
    tmp_path: Path, text: bytes | None
) -> None:
    """img2dataset writes such samples where a caption was missing; open_clip drops them without a word."""
    members = {"a.jpg": PICTURES["plain.jpg"], "a.txt": b"words", "b.jpg": PICTURES["grey.jpg"]}
    source = dataset(tmp_path, members | ({} if text is None else {"b.txt": text}), kind="retrieval")
    with pytest.raises(ShardError, match=r"sample 'b' has no (\.txt member|caption)"):
        load(source, 8, tmp_path / "cache")


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["GNU", "PAX"])
def test_long_names_lead_to_their_own_bytes(tmp_path: Path, form: int) -> None:
    """webdataset #428: names of more than 100 characters take an extended header before the member's own."""
    long = "directory/" + "n" * 180
    members = {
        f"{long}-{name.replace('.', f'-{number}.')}": data
        for number, (name, data) in enumerate(PICTURES.items())
    }
    with_classes: dict[str, bytes] = {}
    for name, data in members.items():
        with_classes |= {name: data, f"{name.rpartition('.')[0]}.cls": b"1"}
    images = load(dataset(tmp_path, with_classes, form=form), 8, tmp_path / "cache").images
    assert isinstance(images, Pictures)
    files = [images._shards.picture(row) for row in range(9)]
    assert files == list(PICTURES.values()) and images._shards.name(3).startswith(f"{long}-progressive")


def test_shard_without_samples_takes_no_row(tmp_path: Path) -> None:
    """An empty shard (a failed part of a download) neither ends nor shifts what comes behind it."""
    source = dataset(
        tmp_path,
        labelled({"a.jpg": PICTURES["plain.jpg"]}),
        {},
        labelled({"b.jpg": PICTURES["grey.jpg"]}),
        {},
    )
    samples = load(source, 8, tmp_path / "cache")
    assert isinstance(samples.images, Pictures) and len(samples) == 2
    assert [samples.images._original(row).shape for row in (0, 1)] == [(30, 40, 3), (47, 33, 3)]
    assert isinstance(samples.captions, Captions) and list(samples.captions) == [(), ()]


def test_size_as_a_person_sees_it_is_known_without_decoding(tmp_path: Path) -> None:
    shard = tmp_path / "0.tar"
    shard_of(shard, labelled({"turned.jpg": PICTURES["turned.jpg"], "plain.jpg": PICTURES["plain.jpg"]}))
    assert [(one.size, one.plain) for one in samples_in(shard, "classification")] == [
        ((50, 20), False),
        ((30, 40), True),
    ]
