"""Writer of datasets in the CLIP-benchmark layout, with the manifest of this project.

Every dataset that this project makes is written here, so that all have manifests and equal naming.
Invariant: equal samples in equal order give byte-identical files, whoever writes them and when.
"""

import io
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
from PIL import Image

from workers.data.cache import file_sha256
from workers.data.manifest import ShardInfo, write_manifest

SHARD_SAMPLES = 1000


@dataclass(frozen=True)
class Encoded:
    """An encoded picture: `suffix` (jpg, png or webp) and the bytes of its file."""

    suffix: str
    data: bytes


@dataclass(frozen=True)
class Sample:
    """One image (uint8 [H, W, 3]) with a class index (classification), captions (retrieval), or both."""

    image: np.ndarray
    label: int | None = None
    captions: tuple[str, ...] = ()

    @property
    def picture(self) -> Encoded:
        """The image as PNG."""
        return Encoded("png", encode_png(self.image))


@dataclass(frozen=True)
class StoredSample:
    """A sample whose picture is encoded already; its bytes are written unchanged."""

    picture: Encoded
    label: int | None = None
    captions: tuple[str, ...] = ()


def write_dataset(
    home: Path,
    *,
    kind: str,
    classes: Sequence[str],
    templates: Sequence[str],
    splits: Mapping[str, Iterable[Sample | StoredSample]],
    shard_samples: int = SHARD_SAMPLES,
) -> None:
    """Write one dataset into the folder `home`, in shards of at most `shard_samples` samples.

    `kind` is "classification" or "retrieval"; `templates` hold `{c}` in place of the class name. Raises FileExistsError if `home`
    already has the folder of a split.
    """
    home.mkdir(parents=True, exist_ok=True)
    _write_lines(home / "dataset_type.txt", [kind])
    if classes:
        _write_lines(home / "classnames.txt", classes)
    if templates:
        _write_lines(home / "zeroshot_classification_templates.txt", templates)
    manifest = {
        name: _write_split(home / name, iter(samples), shard_samples) for name, samples in splits.items()
    }
    write_manifest(home, manifest)


def _write_split(
    place: Path, samples: Iterator[Sample | StoredSample], shard_samples: int
) -> list[ShardInfo]:
    place.mkdir()
    shards: list[ShardInfo] = []
    for sample in samples:
        path = place / f"{len(shards)}.tar"
        chunk = chain([sample], islice(samples, shard_samples - 1))
        count = write_shard(path, chunk, first=len(shards) * shard_samples)
        shards.append(ShardInfo(path.name, file_sha256(path), count, path.stat().st_size))
    _write_lines(place / "nshards.txt", [str(len(shards))])
    return shards


def write_shard(path: Path, samples: Iterable[Sample | StoredSample], first: int = 0) -> int:
    """Write one tar with the keys s0000000, s0000001, ... from `first`; returns the number of samples."""
    number = first - 1
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for number, sample in enumerate(samples, start=first):
            key = f"s{number:07d}"
            picture = sample.picture
            _add(archive, f"{key}.{picture.suffix}", picture.data)
            if sample.label is not None:
                _add(archive, f"{key}.cls", str(sample.label).encode("ascii"))
            if sample.captions:
                _add(archive, f"{key}.txt", "\n".join(sample.captions).encode("utf-8"))
    return number + 1 - first


def encode_png(image: np.ndarray) -> bytes:
    """PNG bytes of a uint8 [H, W, 3] image, without metadata."""
    assert image.dtype == np.uint8 and image.ndim == 3, (image.dtype, image.shape)
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG", compress_level=3)
    return stream.getvalue()


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o644
    archive.addfile(member, io.BytesIO(data))


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
