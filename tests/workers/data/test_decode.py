"""A split is verified and decoded once, with the same bits as open_clip's own preprocessing."""

import io
import json
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from merge_service.errors import UserError
from tests.workers.data.test_manifest import add_member, refused, restate, write
from tests.workers.data_helpers import write_coloured
from workers.data import decode
from workers.data.decode import evaluation_geometry, load
from workers.data.tarscan import ShardError
from workers.data.writer import Sample, write_dataset
from workers.feed.device import Host
from workers.feed.pixels import Pixels
from workers.jobs import Source


def photograph(mode: str, size: tuple[int, int], form: str) -> Image.Image:
    draw = np.random.default_rng(sum(size))
    image = Image.fromarray(draw.integers(0, 255, (size[1], size[0], 4), dtype=np.uint8), "RGBA").convert(
        mode
    )
    stream = io.BytesIO()
    image.save(stream, form)
    return Image.open(stream)


@pytest.mark.parametrize(
    ("mode", "form"),
    [("RGB", "JPEG"), ("RGBA", "PNG"), ("L", "PNG"), ("P", "PNG"), ("1", "PNG"), ("RGB", "WEBP")],
)
@pytest.mark.parametrize("resize", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [32, (24, 40)])
def test_decoded_and_normalised_image_equals_open_clip_bit_for_bit(
    mode: str, form: str, resize: str, interpolation: str, size: int | tuple[int, int]
) -> None:
    geometry = {"resize_mode": resize, "interpolation": interpolation, "fill_color": 7}
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    config = open_clip.transform.PreprocessCfg(size=size, mean=mean, std=std, **geometry)
    expected = open_clip.transform.image_transform_v2(config, is_train=False)
    ours = evaluation_geometry([size] * 2 if isinstance(size, int) else size, geometry)
    for shape in ((70, 45), (20, 31), (32, 32)):
        pixels = np.asarray(ours(photograph(mode, shape, form)))[None]
        assert pixels.dtype == np.uint8
        made = Pixels({"mean": mean, "std": std}, Host.place)(torch.from_numpy(pixels.copy()))
        assert torch.equal(made[0], expected(photograph(mode, shape, form)))


def test_loaded_split_holds_images_labels_and_prompts(tmp_path: Path) -> None:
    samples = load(write_coloured(tmp_path, "toys", 25), 8, tmp_path / "cache")
    assert (
        samples.images.shape == (25, 8, 8, 3)
        and samples.images.dtype == np.uint8
        and not samples.images.flags.writeable
    )
    assert list(samples.images[:, 0, 0, 0]) == list(range(25)) and list(samples.labels) == [
        i % 3 for i in range(25)
    ]
    assert samples.texts(4) == ["a toys 1", "the toys 1"]


def test_second_load_maps_the_same_bytes_without_the_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_coloured(tmp_path, "toys", 25)
    first = load(source, 8, tmp_path / "cache")
    monkeypatch.setattr(decode, "_samples", lambda *_: pytest.fail("decoded again"))
    assert load(source, 8, tmp_path / "cache") is first
    decode._mapped.cache_clear()
    second = load(source, 8, tmp_path / "cache")
    assert second is not first and isinstance(second.images.base, np.memmap)
    assert np.array_equal(first.images, second.images) and np.array_equal(first.labels, second.labels)
    assert first.captions == second.captions


def test_cache_is_keyed_by_content_size_and_geometry(tmp_path: Path) -> None:
    source, cache = write_coloured(tmp_path / "one", "toys", 25), tmp_path / "cache"
    other = write_coloured(tmp_path / "two", "toys", 25, first=40)
    assert load(source, 8, cache).images.shape[1] == 8
    assert load(source, 6, cache).images.shape[1] == 6
    assert load(source, 8, cache, {"resize_mode": "squash"}).images.shape[1] == 8
    assert load(other, 8, cache).images[0, 0, 0, 0] == 40
    assert len([path for path in (cache / "decoded").iterdir() if path.is_dir()]) == 4


def test_only_the_wanted_classes_are_kept_with_their_own_numbers(tmp_path: Path) -> None:
    source = write_coloured(tmp_path, "toys", 25)
    some = load(Source(source.root, "toys", "train", ("toys 2", "toys 0")), 8, tmp_path / "cache")
    assert len(some) == len(some.images) == 17 and set(some.labels) == {0, 2}
    assert list(some.images[:3][:, 0, 0, 0]) == [0, 2, 3] and some.images[5].shape == (8, 8, 3)
    assert some.texts(1) == ["a toys 2", "the toys 2"]
    with pytest.raises(UserError, match="no class 'toys 9'"):
        load(Source(source.root, "toys", "train", ("toys 9",)), 8, tmp_path / "cache")


def test_retrieval_captions_come_one_a_line(tmp_path: Path) -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    splits = {"test": [Sample(image, captions=("a red toy", "ein Würfel"))]}
    write_dataset(tmp_path / "pairs", kind="retrieval", classes=[], templates=[], splits=splits)
    samples = load(Source(str(tmp_path), "pairs", "test"), 8, tmp_path / "cache")
    assert samples.captions == [("a red toy", "ein Würfel")] and list(samples.labels) == [-1]
    assert samples.texts(0) == ("a red toy", "ein Würfel")


@pytest.mark.fault("F24")
def test_damaged_shard_stops_the_load_and_leaves_no_cache(tmp_path: Path) -> None:
    shard = write(tmp_path) / "train" / "0.tar"
    shard.write_bytes(shard.read_bytes()[:-2000])
    with pytest.raises(ShardError, match=r"train/0\.tar: cut"):
        load(Source(str(tmp_path), "toys", "train"), 8, tmp_path / "cache")
    assert not list(tmp_path.glob("cache/decoded/*/"))
    assert refused(tmp_path).reason == "cut"


@pytest.mark.fault("F24")
@pytest.mark.parametrize(
    ("label", "says"),
    [(b"3", "classnames.txt holds 3"), (b"two", "has the class 'two'"), (b"\xff", "not UTF-8")],
)
def test_label_outside_the_class_list_is_refused_by_name(tmp_path: Path, label: bytes, says: str) -> None:
    home = write(tmp_path)
    from tests.workers.data.test_manifest import encode_png, pictures

    add_member(home / "train" / "2.tar", "t1.png", encode_png(pictures(1)[0].image))
    add_member(home / "train" / "2.tar", "t1.cls", label)
    body = json.loads((home / "manifest.json").read_text())
    body["splits"]["train"][2]["samples"] += 1
    (home / "manifest.json").write_text(json.dumps(body))
    restate(home)
    with pytest.raises(ShardError, match=says):
        load(Source(str(tmp_path), "toys", "train"), 8, tmp_path / "cache")


@pytest.mark.fault("F22")
def test_environment_of_webdataset_has_no_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_coloured(tmp_path, "toys", 25)
    canary = tmp_path / "canary"
    monkeypatch.setenv("GOPEN_REWRITE", f"{tmp_path}=pipe:touch {canary};echo ")
    assert len(load(source, 8, tmp_path / "cache")) == 25
    assert not canary.exists()


def _load_total(arguments: tuple[Source, str]) -> int:
    return int(load(arguments[0], 8, arguments[1]).images.sum())


def test_processes_that_load_at_once_share_one_cache_entry(tmp_path: Path) -> None:
    source, cache = write_coloured(tmp_path, "toys", 25), tmp_path / "cache"
    with multiprocessing.get_context("fork").Pool(3) as pool:
        totals = pool.map(_load_total, [(source, str(cache))] * 6)
    assert len(set(totals)) == 1 and totals[0] > 0
    assert len([path for path in (cache / "decoded").iterdir() if path.is_dir()]) == 1


def mapped(name: str) -> dict[str, int]:
    """Bytes of this process's maps of files of that name, by kind of page."""
    found: dict[str, int] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, _, rest = line.partition(":")
        if "-" in key.split(" ")[0]:
            inside = line.endswith(f"/{name}")
        elif inside and rest.endswith(" kB"):
            found[key] = found.get(key, 0) + 1024 * int(rest[:-3])
    return found


def touch(source: Source, cache: Path, size: int, told: Any) -> None:
    images = load(source, size, cache).images
    total = int(np.asarray(images).sum())
    told.put((total, mapped("images.npy")))
    told.close()


@pytest.mark.parametrize("reading", ["decoded", "encoded"])
def test_processes_share_the_pages_of_what_is_mapped_and_hold_no_copy(tmp_path: Path, reading: str) -> None:
    """Decoded pictures of a split are in memory once for all experts of a node; of a split as it is stored, nothing is."""
    source, size, cache = write_coloured(tmp_path, "toys", 25), 64, tmp_path / "cache"
    images = load(source, size, cache).images
    whole = images.nbytes
    if reading == "encoded":
        stored = load(replace(source, reading="encoded"), size, tmp_path / "other").images
        assert not isinstance(stored, np.ndarray) and not list((tmp_path / "other").rglob("images.npy"))
        return
    mine = int(np.asarray(images).sum())
    told: Any = multiprocessing.get_context("spawn").SimpleQueue()
    other = multiprocessing.get_context("spawn").Process(target=touch, args=(source, cache, size, told))
    other.start()
    total, pages = told.get()
    other.join()
    assert total == mine and pages["Rss"] >= whole
    assert pages["Shared_Clean"] >= whole > 4096 > pages["Private_Dirty"] + pages["Anonymous"]
