"""Small files by key that are durable once written, in a directory or under a URL: where the log of a service is kept.

Invariant: `create` is exclusive. Of two writers of one key exactly one is answered True, unless both wrote the same bytes. What it
and `write` have returned from survives a power cut.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from merge_service.files import make_directory, prepared, sync_directory
from pipeline.errors import StoreError
from pipeline.files.disk import written_below
from pipeline.store.objects import Objects


class Shelf(Protocol):
    """Durable small files."""

    @property
    def where(self) -> str: ...
    def create(self, key: str, data: bytes) -> bool: ...
    def write(self, key: str, data: bytes) -> None: ...
    def read(self, key: str) -> bytes | None: ...
    def has(self, key: str) -> bool: ...
    def keys(self, prefix: str) -> list[str]: ...
    def remove(self, key: str) -> None: ...


@dataclass(frozen=True)
class Directory:
    """Files below a directory. A new name is a link to a temporary file whose bytes are on disk; it exists whole or not at all."""

    root: Path

    @property
    def where(self) -> str:
        return str(self.root)

    def create(self, key: str, data: bytes) -> bool:
        path = self.root / key
        with self._written(path, data) as written:
            try:
                os.link(written, path)
            except FileExistsError:
                return self.read(key) == data
            except OSError as error:
                if error.errno in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                    raise StoreError(
                        f"{self.root} is on a file system without hard links, so two writers could both extend the log; "
                        "choose another --out"
                    ) from error
                raise
        sync_directory(path.parent)
        return True

    def write(self, key: str, data: bytes) -> None:
        path = self.root / key
        with self._written(path, data) as written:
            written.replace(path)
        sync_directory(path.parent)

    def read(self, key: str) -> bytes | None:
        try:
            return (self.root / key).read_bytes()
        except FileNotFoundError:
            return None

    def has(self, key: str) -> bool:
        return (self.root / key).is_file()

    def keys(self, prefix: str) -> list[str]:
        """The names in one directory, sorted."""
        place = self.root / prefix
        if not place.is_dir():
            return []
        return sorted(
            f"{prefix}/{one.name}" for one in os.scandir(place) if one.is_file() and one.name[0] != "."
        )

    def remove(self, key: str) -> None:
        (self.root / key).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _written(self, path: Path, data: bytes) -> Iterator[Path]:
        """A temporary file beside `path` with these bytes, on disk; gone at the end unless it was renamed."""
        with written_below(path.parent, path.name):
            make_directory(path.parent)
            with prepared(path, data) as target:
                yield target


@dataclass(frozen=True)
class Bucket:
    """Objects below a URL. `create` is a conditional put where the backend has one (S3, GCS)."""

    objects: Objects

    @property
    def where(self) -> str:
        return self.objects.url

    def create(self, key: str, data: bytes) -> bool:
        return self.objects.create(key, data)

    def write(self, key: str, data: bytes) -> None:
        self.objects.write(key, data)

    def read(self, key: str) -> bytes | None:
        return self.objects.read(key)

    def has(self, key: str) -> bool:
        return self.objects.read(key) is not None

    def keys(self, prefix: str) -> list[str]:
        """The keys directly below a prefix, sorted."""
        return sorted(key for key in self.objects.sizes(prefix) if "/" not in key[len(prefix) + 1 :])

    def remove(self, key: str) -> None:
        self.objects.remove(key)


def shelf_at(where: str) -> Shelf:
    """The shelf in a directory or at a URL."""
    return Bucket(Objects(where.rstrip("/"))) if "://" in where else Directory(Path(where))
