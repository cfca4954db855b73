"""Decoding a split once, into an array that every process maps.

webdataset groups the members; what they may be was settled by `manifest.verify`, and they are decoded here by suffix, never by
`webdataset.decode`, which runs code found in shards. Shards are opened here as plain local files, so that no URL scheme, no
`pipe:` and no environment variable of webdataset has a say. Images pass through the very transforms of open_clip's evaluation
preprocessing up to, and without, ToTensor and Normalize: `normalise` applies those two later, bit for bit as open_clip does.
Invariant: the cache entry is complete or absent, and its name is the content it was made from.
"""

import fcntl
import hashlib
import json
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from merge_service.errors import UserError
from workers.data import manifest
from workers.data.contents import open_image
from workers.data.tarscan import IMAGE_SUFFIXES, ShardError
from workers.jobs import Source

GEOMETRY = ("interpolation", "resize_mode", "fill_color")


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

    Labels count in `classes`, the dataset's full list, also where only some classes are kept.
    """

    name: str
    kind: str
    images: np.ndarray | Rows
    labels: np.ndarray
    captions: list[tuple[str, ...]]
    classes: tuple[str, ...]
    templates: tuple[str, ...]

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
    ask at the same time wait for the first. Raises UserError (unknown dataset, split or class) and ShardError.
    """
    info = manifest.describe(source.root, source.dataset, cache)
    split = manifest.split_of(info, source.split)
    geometry = {key: preprocess[key] for key in GEOMETRY if preprocess and preprocess.get(key) is not None}
    size = height_and_width(image_size)
    key = hashlib.sha256(
        json.dumps([split.digest, info.kind, len(info.classes), size, geometry], sort_keys=True).encode()
    ).hexdigest()
    place = Path(cache) / "decoded" / f"{source.dataset.replace('/', '-')}-{source.split}-{key[:20]}"
    if not place.is_dir():
        with _only_one(place):
            if not place.is_dir():
                _decode_into(place, source, info, split, size, geometry, Path(cache))
    everything = _mapped(place.absolute(), info.name, info.kind, info.classes, info.templates)
    return everything if source.classes is None else _only_classes(everything, source.classes)


@lru_cache(maxsize=256)
def _mapped(
    place: Path, name: str, kind: str, classes: tuple[str, ...], templates: tuple[str, ...]
) -> Samples:
    """A cache entry, mapped; what bears the same name later has the same content, so it need not be opened again."""
    images = np.asarray(np.load(place / "images.npy", mmap_mode="r", allow_pickle=False))
    labels = np.load(place / "labels.npy", allow_pickle=False)
    labels.flags.writeable = False
    captions = [tuple(texts) for texts in json.loads((place / "captions.json").read_text(encoding="utf-8"))]
    return Samples(name, kind, images, labels, captions, classes, templates)


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
    images = Rows(samples.images, rows)
    return Samples(
        samples.name, samples.kind, images, samples.labels[rows], captions, samples.classes, samples.templates
    )


def _decode_into(
    place: Path, source: Source, info: manifest.DatasetInfo, split: manifest.SplitInfo, size: list[int], geometry: dict[str, Any], cache: Path
) -> None:  # fmt: skip
    """Write one cache entry: decode into a directory of our own, then give it its name."""
    manifest.verify(source.root, source.dataset, source.split, cache)
    transform = evaluation_geometry(size, geometry)
    work = Path(tempfile.mkdtemp(prefix=f"{place.name}.partial-", dir=place.parent))
    try:
        shape = (split.samples, *size, 3)
        images = (
            np.lib.format.open_memmap(work / "images.npy", mode="w+", dtype=np.uint8, shape=shape)
            if split.samples
            else None
        )
        labels, captions = np.full(split.samples, -1, np.int64), []
        home = manifest.folder(source.root, source.dataset) / source.split
        for row, (image, label, texts) in enumerate(_samples(home, info, split, transform)):
            assert images is not None
            images[row], labels[row] = image, label
            captions.append(texts)
        if images is None:
            np.save(work / "images.npy", np.empty(shape, np.uint8))
        else:
            images.flush()
            del images
        np.save(work / "labels.npy", labels)
        (work / "captions.json").write_text(json.dumps(captions), encoding="utf-8")
        if not place.is_dir():
            work.rename(place)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _samples(
    home: Path,
    info: manifest.DatasetInfo,
    split: manifest.SplitInfo,
    transform: Callable[[Image.Image], Image.Image],
) -> Iterator[tuple[np.ndarray, int, list[str]]]:
    """(image, label, captions) of every sample, in the order of the shards."""
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

    with path.open("rb") as stream:
        try:
            yield from group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}]))
        except (tarfile.TarError, OSError, ValueError, EOFError) as error:
            raise ShardError(path, "unreadable", f"webdataset cannot read it ({error!s:.200})") from None


def _decode(
    sample: Mapping[str, Any],
    path: Path,
    info: manifest.DatasetInfo,
    transform: Callable[[Image.Image], Image.Image],
) -> tuple[np.ndarray, int, list[str]]:
    key = sample["__key__"]
    suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in sample), "")
    if not suffix or (info.kind == "classification" and "cls" not in sample):
        raise ShardError(path, "unreadable", f"sample {key!r} has no image, or no label")
    image = open_image(sample[suffix], path, f"{key}.{suffix}")
    try:
        pixels = np.asarray(transform(image))
    except (OSError, ValueError, SyntaxError) as error:
        raise ShardError(path, "unreadable", f"image {key}.{suffix} cannot be decoded ({error})") from None
    captions = _text(sample.get("txt", b""), path, key).split("\n")
    texts = [line.strip() for line in captions if line.strip()]
    if info.kind == "retrieval":
        if not texts:
            raise ShardError(path, "unreadable", f"sample {key!r} has no caption")
        return pixels, -1, texts
    label = _text(sample["cls"], path, key).strip()
    if not _is_number(label) or int(label) >= len(info.classes):
        raise ShardError(
            path,
            "unreadable",
            f"sample {key!r} has the class {label[:20]!r}; classnames.txt holds {len(info.classes)}",
        )
    return pixels, int(label), texts


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 9


def _text(data: bytes, path: Path, key: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise ShardError(path, "unreadable", f"sample {key!r} holds text that is not UTF-8") from None


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


@contextmanager
def _only_one(place: Path) -> Iterator[None]:
    """Let one process at a time make `place`. Where the file system has no locks, all make it and the first to rename wins."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.with_name(f".{place.name}.lock").open("w") as lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
