"""Objects under a URL by key: all operations of the store on a bucket, through fsspec.

Invariant: failures are retried here and nowhere else in this project, and end as an error of ours that names the URL.
The value holds only the URL; credentials and endpoints come from the environment, as fsspec reads them.
"""

import contextlib
import errno
import hashlib
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import ConfigError, StoreError, StoreUnwritable

TRIES, FIRST_PAUSE = 6, 0.2
_CHUNK = 8 * 2**20
_FINAL = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
_FINAL += (ValueError, TypeError, NotImplementedError, AttributeError, ImportError)  # type: ignore[assignment]
_FINAL_CODES = {errno.ENOSPC, errno.EDQUOT, errno.EINVAL, errno.ENOSYS, errno.EROFS}
_FINAL_NAMES = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"}

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Objects:
    """The objects whose keys begin with `url`. Keys are relative, with '/' between their parts."""

    url: str

    def read(self, key: str) -> bytes | None:
        """The content of an object; None if it does not exist."""
        try:
            return bytes(self._retried(lambda system, root: system.cat_file(f"{root}/{key}"), key))
        except FileNotFoundError:
            return None

    def part(self, key: str, start: int, stop: int) -> bytes:
        """Bytes start..stop of an object. Raises FileNotFoundError if it does not exist."""
        return bytes(
            self._retried(lambda system, root: system.cat_file(f"{root}/{key}", start=start, end=stop), key)
        )

    def write(self, key: str, data: bytes) -> None:
        """Write or replace an object."""
        self._retried(lambda system, root: _pipe(system, f"{root}/{key}", data), key)

    def create(self, key: str, data: bytes) -> bool:
        """Write an object unless it exists. Returns whether it holds `data` afterwards.

        Exclusive where the backend supports it (S3, GCS, memory). Elsewhere the object is looked up before writing and
        read back after.
        """
        self._retried(lambda system, root: self._create(system, f"{root}/{key}", data), key)
        return self.read(key) == data

    def upload(self, source: Path, key: str) -> None:
        """Write an object from a file."""

        def put(system: Any, root: str) -> None:
            _make_parent(system, f"{root}/{key}")
            system.put_file(str(source), f"{root}/{key}")

        self._retried(put, key)

    def download(self, key: str, target: Path) -> bool:
        """Write an object to a file. Returns False if the object does not exist."""
        try:
            self._retried(lambda system, root: system.get_file(f"{root}/{key}", str(target)), key)
        except FileNotFoundError:
            return False
        return True

    def digest(self, key: str) -> tuple[str, int] | None:
        """(sha256, bytes) of an object, read in pieces; None if it does not exist."""

        def hashed(system: Any, root: str) -> tuple[str, int]:
            state, size = hashlib.sha256(), 0
            with system.open(f"{root}/{key}", "rb") as stream:
                while piece := stream.read(_CHUNK):
                    state.update(piece)
                    size += len(piece)
            return state.hexdigest(), size

        try:
            return self._retried(hashed, key)
        except FileNotFoundError:
            return None

    def sizes(self, prefix: str) -> dict[str, int]:
        """Bytes by key of every object below a prefix."""

        def listed(system: Any, root: str) -> dict[str, int]:
            system.invalidate_cache()
            found = system.find(f"{root}/{prefix}", detail=True)
            return {
                path.lstrip("/")[len(root.lstrip("/")) + 1 :]: int(info["size"] or 0)
                for path, info in found.items()
            }

        try:
            return self._retried(listed, prefix)
        except FileNotFoundError:
            return {}

    def remove(self, key: str) -> None:
        """Remove an object if it exists."""
        with contextlib.suppress(FileNotFoundError):
            self._retried(lambda system, root: system.rm_file(f"{root}/{key}"), key)

    def _create(self, system: Any, path: str, data: bytes) -> None:
        _make_parent(system, path)
        try:
            system.pipe_file(path, data, mode="create")
        except FileExistsError:
            pass
        except (TypeError, ValueError, NotImplementedError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in (
                errno.EINVAL,
                errno.ENOSYS,
                errno.EOPNOTSUPP,
            ):
                raise
            if not system.exists(path):
                system.pipe_file(path, data)

    def _retried(self, call: Callable[[Any, str], Answer], key: str) -> Answer:
        """Run `call`, and retry after a pause while the failure may be temporary.

        Raises FileNotFoundError, StoreUnwritable, StoreError, ConfigError.
        """
        for attempt in _attempts():
            try:
                return call(*_system(self.url, os.getpid()))
            except FileNotFoundError:
                raise
            except Exception as error:
                last = isinstance(error, _FINAL) or type(error).__name__ in _FINAL_NAMES
                last = last or getattr(error, "errno", None) in _FINAL_CODES
                if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or isinstance(
                    error, ConfigError
                ):
                    raise
                if isinstance(error, PermissionError) or type(error).__name__ in _FINAL_NAMES:
                    raise StoreUnwritable(
                        f"{self.url}/{key}: refused ({error}); give credentials that may read and write there, in the "
                        "environment of every node"
                    ) from error
                if last or attempt == TRIES:
                    raise StoreError(
                        f"{self.url}/{key}: {type(error).__name__}: {error} (tried {attempt} times); check that the "
                        "service can be reached from this node and run again; finished steps are kept"
                    ) from error
        raise AssertionError("unreachable")


def _attempts() -> Iterator[int]:
    for attempt in range(1, TRIES + 1):
        if attempt > 1:
            time.sleep(FIRST_PAUSE * 2 ** (attempt - 2) * random.uniform(0.5, 1.0))
        yield attempt


@cache
def _system(url: str, process: int) -> tuple[Any, str]:
    """The file system of a URL, created again in every process: clients do not survive a fork."""
    try:
        from fsspec.core import url_to_fs

        return url_to_fs(url, use_listings_cache=False, skip_instance_cache=not url.startswith("memory:"))
    except ImportError as error:
        raise ConfigError(f"storage.store: {url}: {error}; for s3:// install temporal-merge[s3]") from error
    except ValueError as error:
        raise ConfigError(f"storage.store: {url} is not a place fsspec knows ({error})") from error


def _pipe(system: Any, path: str, data: bytes) -> None:
    _make_parent(system, path)
    system.pipe_file(path, data)


def _make_parent(system: Any, path: str) -> None:
    """Create the parent directory on file systems that have directories. Buckets are never created."""
    if "s3" not in system.protocol and "gs" not in system.protocol and "abfs" not in system.protocol:
        system.makedirs(path.rpartition("/")[0], exist_ok=True)
