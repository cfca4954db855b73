"""Decoding a split once, into an array that every process maps.

webdataset groups the members; what they may be was settled by `manifest.verify`, and they are decoded here by suffix, never by
`webdataset.decode`, which runs code found in shards. Shards are opened here as plain local files, so that no URL scheme, no
`pipe:` and no environment variable of webdataset has a say. Images pass through the very transforms of open_clip's evaluation
preprocessing up to, and without, ToTensor and Normalize: `normalise` applies those two later, bit for bit as open_clip does.
Invariant: a cache entry is complete or absent, its name is the content it was made from, and it is opened only while its bytes
are those that were written.
"""

import hashlib
import json
import math
import os
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from merge_service.errors import UserError
from workers.data import manifest, pictures
from workers.data.cache import PARTIAL, Access, only_one, whole_folder
from workers.data.contents import captions_of, check_label, label_of, open_image, picture_id
from workers.data.tarscan import IMAGE_SUFFIXES, ShardError
from workers.jobs import Source

GEOMETRY = ("interpolation", "resize_mode", "fill_color")
FORMAT = 2
"""Of a cache entry; raise it when entries are written or filled in another way."""
ENTRY_FILE = "entry.json"
CONTENT_FILES = ("images.npy", "labels.npy", "captions.json", "pictures.npy")


class Rows:
    """Some rows of an array, copied only when asked for: what a class-filtered split shows of the shared memory map."""

    def __init__(self, array: np.ndarray, index: np.ndarray):
        self._array, self._index = array, index
        self.shape, self.dtype = (len(index), *array.shape[1:]), array.dtype

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, key: Any) -> np.ndarray:
        return self._array[self._index[key]]


@dataclass(frozen=True)
class Samples:
    """A decoded split: `images` uint8 [N, H, W, 3], `labels` int64 [N] (-1: no class), `captions` one tuple a sample.

    Labels count in `classes`, the dataset's full list, also where only some classes are kept. `pictures` int64 [N] is a number
    that samples of the same picture file have in common.
    """

    name: str
    kind: str
    images: np.ndarray | Rows
    labels: np.ndarray
    captions: list[tuple[str, ...]]
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    pictures: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def texts(self, index: int) -> Sequence[str]:
        """What sample `index` may be called in training: its captions, else its class in every prompt."""
        if self.captions[index]:
            return self.captions[index]
        name = self.classes[int(self.labels[index])]
        return [template.replace("{c}", name) for template in self.templates]


def load(
    source: Source,
    image_size: int | Sequence[int],
    cache: str | Path,
    preprocess: Mapping[str, Any] | None = None,
) -> Samples:
    """A split, verified and decoded on first use and mapped read-only from `cache` ever after, once per process.

    `preprocess` is an open_clip preprocess_cfg, of which interpolation, resize_mode and fill_color count here. Processes that
    ask at the same time wait for the first. An entry whose bytes have changed is decoded again. Raises UserError (unknown
    dataset, split or class; a cache that cannot be written) and ShardError.
    """
    info = manifest.describe(source.root, source.dataset, cache)
    split = manifest.split_of(info, source.split)
    geometry = {key: preprocess[key] for key in GEOMETRY if preprocess and preprocess.get(key) is not None}
    size = height_and_width(image_size)
    made_of = [FORMAT, pictures.REVISION, split.digest, info.kind, len(info.classes), size, geometry]
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    place = Path(cache) / "decoded" / f"{source.dataset.replace('/', '-')}-{source.split}-{key[:20]}"
    facts = (place.absolute(), info.name, info.kind, info.classes, info.templates)
    try:
        everything = _mapped(*facts)
    except _Unusable:
        _decode_into(place, source, info, evaluation_geometry(size, geometry), (*size, 3), Path(cache))
        everything = _mapped(*facts)
    return everything if source.classes is None else _only_classes(everything, source.classes)


class _Unusable(Exception):
    """A cache entry that is not there, or no longer what was written."""


@lru_cache(maxsize=256)
def _mapped(
    place: Path, name: str, kind: str, classes: tuple[str, ...], templates: tuple[str, ...]
) -> Samples:
    """A cache entry, mapped; what bears the same name later has the same content, so it need not be opened again."""
    _check_entry(place)
    images = np.asarray(np.load(place / "images.npy", mmap_mode="r", allow_pickle=False))
    labels, same = (np.load(place / f"{what}.npy", allow_pickle=False) for what in ("labels", "pictures"))
    labels.flags.writeable = same.flags.writeable = False
    captions = [tuple(texts) for texts in json.loads((place / "captions.json").read_text(encoding="utf-8"))]
    return Samples(name, kind, images, labels, captions, classes, templates, same)


def _check_entry(place: Path) -> None:
    """Raise _Unusable unless the files of an entry have the sha256 that it states."""
    try:
        if not place.is_dir():
            raise _Unusable("it is not there")
        stated = json.loads((place / ENTRY_FILE).read_text(encoding="utf-8"))
        for name in CONTENT_FILES:
            if manifest.file_sha256(place / name) != stated[name]:
                raise _Unusable(f"{name} does not hold the bytes that were written")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _Unusable(f"it cannot be read ({error})") from None


def height_and_width(image_size: int | Sequence[int]) -> list[int]:
    """Two numbers, from open_clip's one or two."""
    return [image_size] * 2 if isinstance(image_size, int) else list(image_size)


def normalise(images: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W], equal bit for bit to torchvision's ToTensor and Normalize."""
    pixels = torch.from_numpy(np.array(images.transpose(0, 3, 1, 2), order="C"))
    return standardise(pixels.to(torch.float32).div_(255), mean, std)


def standardise(pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """(pixels - mean) / std per channel, in place, for float32 [N, 3, H, W] in [0, 1]."""
    shape = (1, 3, 1, 1)
    return pixels.sub_(torch.tensor(mean).view(shape)).div_(torch.tensor(std).view(shape))


def _only_classes(samples: Samples, names: Sequence[str]) -> Samples:
    unknown = [name for name in names if name not in samples.classes]
    if unknown:
        raise UserError(
            f"dataset {samples.name!r} has no class {unknown[0]!r} (of {len(samples.classes)} classes)"
        )
    wanted = np.array([samples.classes.index(name) for name in names], np.int64)
    rows = np.flatnonzero(np.isin(samples.labels, wanted))
    captions = [samples.captions[row] for row in rows]
    assert isinstance(samples.images, np.ndarray)
    return replace(
        samples, images=Rows(samples.images, rows), labels=samples.labels[rows], captions=captions,
        pictures=samples.pictures[rows],
    )  # fmt: skip


def _decode_into(
    place: Path, source: Source, info: manifest.DatasetInfo,
    transform: Callable[[Image.Image], Image.Image], shape: tuple[int, ...], cache: Path,
) -> None:  # fmt: skip
    """Make one cache entry, unless another process has made it meanwhile. An entry that is damaged is thrown away first."""
    home, split = manifest.folder(source.root, source.dataset), info.splits[source.split]
    shards = [home / source.split / shard.file for shard in split.shards]
    manifest.verify(source.root, source.dataset, source.split, cache)
    access = Access.of(Path(source.root), home, home / source.split, *shards)
    try:
        with only_one(place, access):
            try:
                _check_entry(place)
                return
            except _Unusable as problem:
                if place.exists():
                    print(f"{place}: {problem}; the split is decoded again", file=sys.stderr, flush=True)
                    worthless = place.with_name(f"{place.name}{PARTIAL}damaged")
                    place.rename(worthless)
                    shutil.rmtree(worthless, ignore_errors=True)
            with whole_folder(place, access) as work:
                decoded = _samples(home / source.split, info, split, transform)
                _write_entry(work, decoded, (split.samples, *shape))
    except OSError as error:
        raise UserError(
            f"the data cache {cache} cannot be written ({error}); set data.cache to a folder that can, with room for "
            f"{math.prod(shape) * split.samples:,} bytes of {source.dataset}"
        ) from error


def _write_entry(
    work: Path, decoded: Iterable[tuple[np.ndarray, int, list[str], str]], shape: tuple[int, ...]
) -> None:
    """Fill the folder of an entry; the last file states the digests of the others."""
    labels, captions = np.full(shape[0], -1, np.int64), []
    same, first = np.arange(shape[0]), dict[str, int]()
    if not shape[0]:
        np.save(work / "images.npy", np.empty(shape, np.uint8))
    else:
        images = np.lib.format.open_memmap(work / "images.npy", mode="w+", dtype=np.uint8, shape=shape)
        with (work / "images.npy").open(
            "r+b"
        ) as file:  # writing to a map of a full disk would kill the process
            os.posix_fallocate(file.fileno(), 0, (work / "images.npy").stat().st_size)
        for row, (image, label, texts, picture) in enumerate(decoded):
            images[row], labels[row], same[row] = image, label, first.setdefault(picture, row)
            captions.append(texts)
        images.flush()
        del images
    np.save(work / "labels.npy", labels)
    np.save(work / "pictures.npy", same)
    (work / "captions.json").write_text(json.dumps(captions), encoding="utf-8")
    digests = {name: manifest.file_sha256(work / name) for name in CONTENT_FILES}
    (work / ENTRY_FILE).write_text(json.dumps(digests), encoding="utf-8")


def _samples(
    home: Path,
    info: manifest.DatasetInfo,
    split: manifest.SplitInfo,
    transform: Callable[[Image.Image], Image.Image],
) -> Iterator[tuple[np.ndarray, int, list[str], str]]:
    """(image, label, captions, what names the picture) of every sample, in the order of the shards."""
    for shard in split.shards:
        path, count = home / shard.file, 0
        for sample in _grouped(path):
            count += 1
            if count <= shard.samples:
                yield _decode(sample, path, info, transform)
        if count != shard.samples:
            raise ShardError(path, "short", f"{count} samples came out, {shard.samples} are stated")


def _grouped(path: Path) -> Iterator[Mapping[str, Any]]:
    """The samples of a shard as webdataset sees them. Raises ShardError where it sees less than the scanner did."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    try:
        with path.open("rb") as stream:
            yield from group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}]))
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        raise ShardError(path, "unreadable", f"webdataset cannot read it ({error!s:.200})") from None


def _decode(
    sample: Mapping[str, Any],
    path: Path,
    info: manifest.DatasetInfo,
    transform: Callable[[Image.Image], Image.Image],
) -> tuple[np.ndarray, int, list[str], str]:
    key = sample["__key__"]
    suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in sample), "")
    if not suffix or (info.kind == "classification" and "cls" not in sample):
        raise ShardError(path, "unreadable", f"sample {key!r} has no image, or no label")
    data = sample[suffix]
    image = open_image(data, path, f"{key}.{suffix}")
    try:
        pixels = np.asarray(transform(pictures.as_seen(image)))
    except (OSError, ValueError, SyntaxError) as error:
        raise ShardError(path, "unreadable", f"image {key}.{suffix} cannot be decoded ({error})") from None
    texts = captions_of(sample.get("txt", b""), path, key)
    if info.kind == "retrieval":
        return pixels, -1, texts, picture_id(data)
    label = label_of(sample["cls"], path, key)
    check_label(label, len(info.classes), path, key)
    return pixels, label, texts, picture_id(data)


def evaluation_geometry(
    size: Sequence[int], geometry: Mapping[str, Any]
) -> Callable[[Image.Image], Image.Image]:
    """open_clip's evaluation preprocessing without its last two steps: PIL image -> RGB PIL image of `size` (height, width)."""
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from torchvision.transforms import Compose, Normalize, ToTensor

    target = size[0] if size[0] == size[1] else tuple(size)
    steps = image_transform_v2(PreprocessCfg(size=target, **geometry), is_train=False).transforms
    assert isinstance(steps[-2], ToTensor) and isinstance(steps[-1], Normalize), steps
    transform, width_height = Compose(steps[:-2]), (size[1], size[0])

    def apply(image: Image.Image) -> Image.Image:
        # Every resize mode leaves an RGB image of the right size as it is; not asking saves a third of the time.
        return image if image.mode == "RGB" and image.size == width_height else transform(image)

    return apply
