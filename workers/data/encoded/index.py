"""Where every sample of a split lies in its shards, found once and mapped by every process ever after.

Shards are checked as the index is made: their bytes against the manifest, their samples against the rules of `contents`. One shard is
in memory at a time (one at an address is copied beside the index first, and removed), a sample takes 57 bytes of disk, and what is
mapped is read page by page. The index of shards at an address also holds a digest of every picture and text: what is read later is
checked against it, as no size or time of a file says that it is unchanged.
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
from workers.data.encoded.remote import copy_shard
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
DIGESTS = np.dtype([*PLACE.descr, ("text", "V16")])
"""PLACE of shards at an address: `picture` is filled for every sample, `text` names the content of its captions."""
PARTS = (("offset", "length", "picture"), ("text_offset", "text_length", "text"))
"""Where the parts of a sample are, and the field of their digest."""
FILES = ("places.npy", "labels.npy", "stamps.npy")


@dataclass(frozen=True)
class Split:
    """One split: `home` is its folder, `shards` what the manifest states of it, `address` where they are if not in `home`."""

    dataset: str
    home: Path
    kind: str
    classes: int
    digest: str
    shards: tuple[ShardInfo, ...]
    address: str = ""

    @classmethod
    def of(cls, root: str, info: DatasetInfo, name: str) -> "Split":
        """A split of a dataset under a root."""
        split = info.splits[name]
        home = folder(root, info.name) / name
        return cls(info.name, home, info.kind, len(info.classes), split.digest, split.shards, split.address)

    @property
    def samples(self) -> int:
        """Of all shards, as stated."""
        return sum(shard.samples for shard in self.shards)

    def place(self, cache: Path) -> Path:
        """Where its index is kept: the name says what it was made from and how."""
        made_of = [FORMAT, contents.REVISION, pictures.REVISION, self.digest, self.kind, self.classes]
        if self.address:
            made_of.append("at an address")
        key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
        return cache / "encoded" / f"{self.dataset.replace('/', '-')}-{self.home.name}-{key[:20]}"


@dataclass(frozen=True, eq=False)
class Index:
    """`places` PLACE (or DIGESTS) [N], `labels` int64 [N] (-1: no class), both mapped."""

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
        access = Access.of(root, split.home.parent, *([] if split.address else [split.home, *_files(split)]))
        try:
            make_entry(place, access, FILES, lambda work: _fill(work, split), "the split is indexed again")
        except OSError as error:
            raise UserError(
                f"the data cache {cache} cannot be written ({error}); set data.cache to a folder that can, with room for "
                f"{(PLACE.itemsize + 8) * split.samples:,} bytes of {split.dataset}"
            ) from error
    else:
        if not split.address:
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
    fields = DIGESTS if split.address else PLACE
    with (work / "places.npy").open("wb") as places, (work / "labels.npy").open("wb") as labels:
        for file, dtype in ((places, fields), (labels, np.dtype("<i8"))):
            described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
            np.lib.format.write_array_header_2_0(file, {**described, "shape": (split.samples,)})
        for number, (path, shard) in enumerate(zip(_files(split), split.shards, strict=True)):
            if split.address:
                stamps[number] = 0
                rows, named = _fetched(work / "shard.tar", shard, split)
            else:
                stamps[number] = _stamp(path) if path.is_file() else 0
                check_bytes(path, shard)
                rows, named = _shard(path, shard, split)
            places.write(rows.tobytes())
            labels.write(named.tobytes())
    np.save(work / "stamps.npy", stamps)


def _fetched(copy: Path, shard: ShardInfo, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """DIGESTS [n] and labels int64 [n] of a shard at an address, by way of a `copy`. Raises ShardError that names the address."""
    address = split.address + shard.file
    try:
        copy_shard(address, shard, copy)
        rows, labels = _shard(copy, shard, split)
        found = np.zeros(len(rows), DIGESTS)
        found[list(PLACE.names or ())] = rows
        with copy.open("rb") as stream:
            for row in found:
                for offset, length, name in PARTS:
                    stream.seek(int(row[offset]))
                    row[name] = content(stream.read(int(row[length])))
        return found, labels
    except ShardError as error:
        raise ShardError(address, *error.args[1:]) from None
    finally:
        copy.unlink(missing_ok=True)


def content(data: bytes) -> bytes:
    """16 bytes that name a content."""
    return bytes.fromhex(picture_id(data))


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
        name = content(sample.data) if split.kind == "retrieval" else bytes(16)
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
