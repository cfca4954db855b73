"""What a remote model is: named files with sizes, of which any range can be read.

Invariant: nothing is written, and a range that is returned has the length that was asked for.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeVar

from merge_service.errors import UserError
from pipeline.errors import StoreError
from pipeline.store.objects import Objects

SUFFIX = ".safetensors"
Found = TypeVar("Found")


class RemoteError(UserError):
    """A remote input cannot be read; the message names the file and what to do."""


class Source(Protocol):
    """A remote model. `url` names exactly these files, `name` is the last part of it."""

    @property
    def url(self) -> str: ...
    @property
    def name(self) -> str: ...

    def files(self) -> Mapping[str, int | None]:
        """The files with their sizes, None where a size is not known."""

    def size(self, file: str) -> int:
        """The size of one file."""

    def part(self, file: str, start: int, stop: int) -> bytes:
        """Bytes start..stop of a file. Raises `RemoteError`."""


@dataclass(frozen=True)
class Bucket:
    """Objects under a URL of fsspec, or one of them that is a file of weights."""

    url: str

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self.url.rstrip("/").rpartition("/")[2]

    def files(self) -> Mapping[str, int | None]:
        """As of `Source`. Raises `RemoteError` if there is nothing."""
        return self._sizes

    def size(self, file: str) -> int:
        """As of `Source`."""
        return self._sizes[file]

    def part(self, file: str, start: int, stop: int) -> bytes:
        """As of `Source`."""
        found = self._said(lambda: self._objects.part(file, start, stop))
        if len(found) != stop - start:
            raise RemoteError(
                f"{self.url}: {file} gave {len(found)} bytes for {stop - start}; it was changed: merge again"
            )
        return found

    @property
    def _is_file(self) -> bool:
        return self.url.endswith(SUFFIX)

    @cached_property
    def _sizes(self) -> dict[str, int]:
        found = self._said(lambda: self._objects.sizes(self.name if self._is_file else ""))
        if not found:
            raise RemoteError(f"{self.url} does not exist, or holds nothing; check bucket and path")
        return dict(found)

    @cached_property
    def _objects(self) -> Objects:
        url = self.url.rstrip("/")
        return Objects(url.rpartition("/")[0] if self._is_file else url)

    def _said(self, call: Callable[[], Found]) -> Found:
        try:
            return call()
        except FileNotFoundError as error:
            raise RemoteError(f"{self.url}: {error} is not there; check bucket and path") from None
        except StoreError as error:
            raise RemoteError(str(error)) from error
