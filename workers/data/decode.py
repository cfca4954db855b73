"""The samples of a split: an array that was decoded once and is mapped by every process, or pictures that are decoded on demand.

webdataset only groups members into samples. `webdataset.decode` runs code that it finds in shards, so members are decoded here by
suffix, after `manifest.verify` has validated them. Shards are opened as local files, so no URL scheme, `pipe:` or environment
variable of webdataset applies. Images pass through the evaluation transforms of open_clip up to ToTensor and Normalize;
`workers.feed.pixels` applies these two later, with the same bits.
Invariant: a cache entry is complete or absent, its name is a digest of the content it was made from, and its bytes are checked when
it is opened.
"""

import hashlib
import json
import math
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import numpy as np
from PIL import Image

from merge_service.errors import UserError
from workers.data import manifest, pictures
from workers.data.cache import Access, Unusable, check_entry, make_entry
from workers.data.contents import captions_of, check_label, label_of, open_image, picture_id
from workers.data.encoded.addresses import check_allowed
from workers.data.encoded.index import Split, index_of
from workers.data.encoded.shards import Shards
from workers.data.seen import reads_encoded
from workers.data.share import Rows
from workers.data.tarscan import IMAGE_SUFFIXES, ShardError
from workers.jobs import Source

if TYPE_CHECKING:
    from workers.data.encoded.pictures import Captions, Pictures, Same

GEOMETRY = ("interpolation", "resize_mode", "fill_color")
FORMAT = 2
"""The format of cache entries; increase it when their files or their content change."""
CONTENT_FILES = ("images.npy", "labels.npy", "captions.json", "pictures.npy")


@dataclass(frozen=True, eq=False)
class Samples:
    """A split: `images` uint8 [N, H, W, 3], `labels` int64 [N] (-1: no class), `captions` one tuple per sample.

    Labels index `classes`, the full list of the dataset, also if only some classes are kept. `pictures` int64 [N] has equal numbers
    for samples of the same picture file. In an encoded split only `labels` is an array; pictures are decoded and captions read on
    access.
    """

    name: str
    kind: str
    images: Union[np.ndarray, Rows, "Pictures"]
    labels: np.ndarray
    captions: Union[list[tuple[str, ...]], "Captions"]
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    pictures: Union[np.ndarray, "Same"]

    def __len__(self) -> int:
        return len(self.labels)

    def texts(self, index: int) -> Sequence[str]:
        """The training texts of sample `index`: its captions, or else its class name in every prompt template."""
        if captions := self.captions[index]:
            return captions
        name = self.classes[int(self.labels[index])]
        return [template.replace("{c}", name) for template in self.templates]


def load(
    source: Source,
    image_size: int | Sequence[int],
    cache: str | Path,
    preprocess: Mapping[str, Any] | None = None,
) -> Samples:
    """Open a split.

    A decoded split is verified and decoded on first use; afterwards it is mapped read-only from `cache`. An encoded split
    (`source.reading`) is verified and indexed on first use, and its pictures are decoded on access. `image_size` is one number or
    (height, width) in pixels; `preprocess` is an open_clip preprocess_cfg, of which interpolation, resize_mode and fill_color are
    used. The first process creates a cache entry while others wait. An entry whose bytes have changed is decoded again.
    Raises UserError (unknown dataset, split or class; a cache that cannot be written) and ShardError (a damaged or unsafe shard).
    """
    info = manifest.describe(source.root, source.dataset, cache)
    split = manifest.split_of(info, source.split)
    geometry = {key: preprocess[key] for key in GEOMETRY if preprocess and preprocess.get(key) is not None}
    size = height_and_width(image_size)
    if reads_encoded(source.reading, split.samples):
        if split.address:
            check_allowed(split.address, source.addresses, f"the {source.split} split of {source.dataset}")
        stored = Split.of(source.root, info, source.split)
        everything = _stored(stored, Path(cache), info.classes, info.templates, (*size, *geometry.items()))
    else:
        everything = _decoded(source, info, size, geometry, Path(cache))
    return everything if source.classes is None else _only_classes(everything, tuple(source.classes))


@lru_cache(maxsize=64)
def _stored(
    split: Split, cache: Path, classes: tuple[str, ...], templates: tuple[str, ...], look: tuple[Any, ...]
) -> Samples:
    """An encoded split. `look` is the height and width of the model's pictures, followed by the (key, value) pairs of `GEOMETRY`."""
    from workers.data.encoded.pictures import Captions, Pictures, Same

    shards = Shards(split, index_of(split, cache))
    height, width, *geometry = look
    transform = evaluation_geometry([height, width], dict(geometry))
    images, captions, same = Pictures(shards, transform, (height, width)), Captions(shards), Same(shards)
    return Samples(split.dataset, split.kind, images, shards.index.labels, captions, classes, templates, same)


def _decoded(
    source: Source,
    info: manifest.DatasetInfo,
    size: Sequence[int],
    geometry: Mapping[str, Any],
    cache: Path,
) -> Samples:
    """A decoded split, from the cache; decoded into the cache on first use."""
    split = info.splits[source.split]
    made_of = [FORMAT, pictures.REVISION, split.digest, info.kind, len(info.classes), size, geometry]
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    place = cache / "decoded" / f"{source.dataset.replace('/', '-')}-{source.split}-{key[:20]}"
    facts = (place.absolute(), info.name, info.kind, info.classes, info.templates)
    try:
        return _mapped(*facts)
    except Unusable:
        _decode_into(place, source, info, evaluation_geometry(size, geometry), (*size, 3), cache)
        return _mapped(*facts)


@lru_cache(maxsize=256)
def _mapped(
    place: Path, name: str, kind: str, classes: tuple[str, ...], templates: tuple[str, ...]
) -> Samples:
    """A cache entry, mapped. Its name determines its content, so one check per process is enough. Raises Unusable."""
    check_entry(place, CONTENT_FILES)
    images = np.asarray(np.load(place / "images.npy", mmap_mode="r", allow_pickle=False))
    labels, same = (np.load(place / f"{what}.npy", allow_pickle=False) for what in ("labels", "pictures"))
    labels.flags.writeable = same.flags.writeable = False
    captions = [tuple(texts) for texts in json.loads((place / "captions.json").read_text(encoding="utf-8"))]
    return Samples(name, kind, images, labels, captions, classes, templates, same)


def height_and_width(image_size: int | Sequence[int]) -> list[int]:
    """[height, width], from an open_clip size of one or two numbers."""
    return [image_size] * 2 if isinstance(image_size, int) else list(image_size)


@lru_cache(maxsize=256)
def _only_classes(samples: Samples, names: tuple[str, ...]) -> Samples:
    unknown = [name for name in names if name not in samples.classes]
    if unknown:
        raise UserError(
            f"dataset {samples.name!r} has no class {unknown[0]!r} (of {len(samples.classes)} classes)"
        )
    wanted = np.array([samples.classes.index(name) for name in names], np.int64)
    rows = np.flatnonzero(np.isin(samples.labels, wanted))
    labels, images, captions, same = samples.labels[rows], samples.images, samples.captions, samples.pictures
    if isinstance(images, np.ndarray) and isinstance(captions, list) and isinstance(same, np.ndarray):
        found = replace(
            samples, images=Rows(images, rows), captions=[captions[row] for row in rows], pictures=same[rows]
        )
    else:
        assert not isinstance(images, np.ndarray | Rows) and not isinstance(captions, list)
        assert not isinstance(same, np.ndarray)
        found = replace(
            samples, images=images.only(rows), captions=captions.only(rows), pictures=same.only(rows)
        )
    return replace(found, labels=labels)


def _decode_into(
    place: Path, source: Source, info: manifest.DatasetInfo,
    transform: Callable[[Image.Image], Image.Image], shape: tuple[int, ...], cache: Path,
) -> None:  # fmt: skip
    """Create one cache entry, unless another process has created it. A damaged entry is removed first. Raises UserError."""
    home, split = manifest.folder(source.root, source.dataset), info.splits[source.split]
    shards = [home / source.split / shard.file for shard in split.shards]
    manifest.verify(source.root, source.dataset, source.split, cache)
    access = Access.of(Path(source.root), home, home / source.split, *shards)

    def fill(work: Path) -> None:
        decoded = _samples(home / source.split, info, split, transform)
        _write_entry(work, decoded, (split.samples, *shape))

    try:
        make_entry(place, access, CONTENT_FILES, fill, "the split is decoded again")
    except OSError as error:
        raise UserError(
            f"the data cache {cache} cannot be written ({error}); set data.cache to a writable folder with room for "
            f"{math.prod(shape) * split.samples:,} bytes of {source.dataset}"
        ) from error


def _write_entry(
    work: Path, decoded: Iterable[tuple[np.ndarray, int, list[str], str]], shape: tuple[int, ...]
) -> None:
    """Write the files of an entry into the folder `work`; `shape` is that of its images."""
    labels, captions = np.full(shape[0], -1, np.int64), []
    same, first = np.arange(shape[0]), dict[str, int]()
    if not shape[0]:
        np.save(work / "images.npy", np.empty(shape, np.uint8))
    else:
        images = np.lib.format.open_memmap(work / "images.npy", mode="w+", dtype=np.uint8, shape=shape)
        with (work / "images.npy").open(
            "r+b"
        ) as file:  # a write to a mapped file on a full disk ends the process by SIGBUS
            os.posix_fallocate(file.fileno(), 0, (work / "images.npy").stat().st_size)
        for row, (image, label, texts, picture) in enumerate(decoded):
            images[row], labels[row], same[row] = image, label, first.setdefault(picture, row)
            captions.append(texts)
        images.flush()
        del images
    np.save(work / "labels.npy", labels)
    np.save(work / "pictures.npy", same)
    (work / "captions.json").write_text(json.dumps(captions), encoding="utf-8")


def _samples(
    home: Path,
    info: manifest.DatasetInfo,
    split: manifest.SplitInfo,
    transform: Callable[[Image.Image], Image.Image],
) -> Iterator[tuple[np.ndarray, int, list[str], str]]:
    """(image, label, captions, `picture_id`) of every sample, in the order of the shards."""
    for shard in split.shards:
        path, count = home / shard.file, 0
        for sample in _grouped(path):
            count += 1
            if count <= shard.samples:
                yield _decode(sample, path, info, transform)
        if count != shard.samples:
            raise ShardError(
                path, "short", f"webdataset finds {count} samples, the manifest states {shard.samples}"
            )


def _grouped(path: Path) -> Iterator[Mapping[str, Any]]:
    """The samples of a shard as webdataset groups them. Raises ShardError if webdataset cannot read the shard."""
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
    """open_clip's evaluation preprocessing without ToTensor and Normalize: PIL image -> RGB PIL image of `size` (height, width)."""
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from torchvision.transforms import Compose, Normalize, ToTensor

    target = size[0] if size[0] == size[1] else tuple(size)
    steps = image_transform_v2(PreprocessCfg(size=target, **geometry), is_train=False).transforms
    assert isinstance(steps[-2], ToTensor) and isinstance(steps[-1], Normalize), steps
    transform, width_height = Compose(steps[:-2]), (size[1], size[0])

    def apply(image: Image.Image) -> Image.Image:
        # Every resize mode returns an RGB image of the right size unchanged; skipping the call saves a third of the time.
        return image if image.mode == "RGB" and image.size == width_height else transform(image)

    return apply
