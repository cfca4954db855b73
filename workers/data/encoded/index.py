"""Where every sample of a split lies in its shards, found once and mapped by every process ever after.

Shards are checked as the index is made: their bytes against the manifest, their samples against the rules of `contents`. One shard is
in memory at a time, a sample takes 57 bytes of disk, and what is mapped is read page by page.
Invariant: row i of an index is the i-th sample of the split's shards in their order, and the shards hold the bytes that were checked.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from merge_service.errors import UserError
from workers.data import contents, pictures
from workers.data.cache import Access, Unusable, check_entry, make_entry
from workers.data.contents import check_label, picture_id, samples_in
from workers.data.manifest import DatasetInfo, ShardInfo, check_bytes, folder, verify_shard
from workers.data.tarscan import ShardError

FORMAT = 1
"""Of an index; raise it when indices are written in another way."""
PLACE = np.dtype(
    [
        ("offset", "<i8"),
        ("length", "<i4"),
        ("height", "<u4"),
        ("width", "<u4"),
        ("text_offset", "<i8"),
        ("text_length", "<i4"),
        ("plain", "?"),
        ("picture", "V16"),
    ]
)
"""The bytes of a picture's file in its shard, its size as a person sees it, the bytes of its captions (none: length 0), whether it is a
plain JPEG, and for retrieval what names its content."""
FILES = ("places.npy", "labels.npy", "stamps.npy")


@dataclass(frozen=True)
class Split:
    """One split on the disk: `home` is its folder, `shards` what the manifest states of it."""

    dataset: str
    home: Path
    kind: str
    classes: int
    digest: str
    shards: tuple[ShardInfo, ...]

    @classmethod
    def of(cls, root: str, info: DatasetInfo, name: str) -> "Split":
        """A split of a dataset under a root."""
        split = info.splits[name]
        home = folder(root, info.name) / name
        return cls(info.name, home, info.kind, len(info.classes), split.digest, split.shards)

    @property
    def samples(self) -> int:
        """Of all shards, as stated."""
        return sum(shard.samples for shard in self.shards)

    def place(self, cache: Path) -> Path:
        """Where its index is kept: the name says what it was made from and how."""
        made_of = [FORMAT, contents.REVISION, pictures.REVISION, self.digest, self.kind, self.classes]
        key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
        return cache / "encoded" / f"{self.dataset.replace('/', '-')}-{self.home.name}-{key[:20]}"


@dataclass(frozen=True, eq=False)
class Index:
    """`places` PLACE [N], `labels` int64 [N] (-1: no class), both mapped."""

    places: np.ndarray
    labels: np.ndarray


def index_of(split: Split, cache: Path) -> Index:
    """The index of a split, made on first use. Processes that ask at the same time wait for the first.

    Raises ShardError for a shard that is damaged or is no longer what was indexed, UserError for a cache that cannot be written.
    """
    place = split.place(cache).absolute()
    try:
        check_entry(place, FILES)
    except Unusable:
        root = split.home.parents[1]
        access = Access.of(root, split.home.parent, split.home, *_files(split))
        try:
            make_entry(place, access, FILES, lambda work: _fill(work, split), "the split is indexed again")
        except OSError as error:
            raise UserError(
                f"the data cache {cache} cannot be written ({error}); set data.cache to a folder that can, with room for "
                f"{(PLACE.itemsize + 8) * split.samples:,} bytes of {split.dataset}"
            ) from error
    else:
        _check_stamps(split, np.load(place / "stamps.npy", allow_pickle=False), cache)
    places, labels = (
        np.asarray(np.load(place / name, mmap_mode="r" if split.samples else None, allow_pickle=False))
        for name in FILES[:2]
    )
    return Index(places, labels)


def _files(split: Split) -> list[Path]:
    return [split.home / shard.file for shard in split.shards]


def _check_stamps(split: Split, stamps: np.ndarray, cache: Path) -> None:
    """Check every shard again whose size or time is no longer what it was."""
    for path, shard, stamp in zip(_files(split), split.shards, stamps, strict=True):
        if not path.is_file() or _stamp(path) != tuple(stamp):
            verify_shard(path, shard, split.kind, cache)


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _fill(work: Path, split: Split) -> None:
    """Write the files of an index, shard by shard."""
    stamps = np.empty((len(split.shards), 2), np.int64)
    with (work / "places.npy").open("wb") as places, (work / "labels.npy").open("wb") as labels:
        for file, dtype in ((places, PLACE), (labels, np.dtype("<i8"))):
            described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
            np.lib.format.write_array_header_2_0(file, {**described, "shape": (split.samples,)})
        for number, (path, shard) in enumerate(zip(_files(split), split.shards, strict=True)):
            stamps[number] = _stamp(path) if path.is_file() else 0
            check_bytes(path, shard)
            rows, named = _shard(path, shard, split)
            places.write(rows.tobytes())
            labels.write(named.tobytes())
    np.save(work / "stamps.npy", stamps)


def _shard(path: Path, shard: ShardInfo, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """PLACE [n] and labels int64 [n] of a shard. Raises ShardError."""
    rows, labels = np.zeros(shard.samples, PLACE), np.full(shard.samples, -1, np.int64)
    count = 0
    for count, sample in enumerate(samples_in(path, split.kind), start=1):
        if count > shard.samples:
            break
        if sample.label >= 0:
            check_label(sample.label, split.classes, path, sample.picture.key)
        text = (sample.text.offset, sample.text.size) if sample.text else (0, 0)
        name = bytes.fromhex(picture_id(sample.data)) if split.kind == "retrieval" else bytes(16)
        rows[count - 1] = (
            sample.picture.offset,
            sample.picture.size,
            *sample.size,
            *text,
            sample.plain,
            name,
        )
        labels[count - 1] = sample.label
    if count != shard.samples:
        raise ShardError(path, "short", f"{count} samples came out, the manifest states {shard.samples}")
    return rows, labels


def rows_of(split: Split) -> np.ndarray:
    """The first row of every shard, and behind the last one the number of all; int64 [shards + 1]."""
    return np.cumsum([0, *(shard.samples for shard in split.shards)], dtype=np.int64)
