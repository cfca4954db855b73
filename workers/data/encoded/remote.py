"""Shards at an address (http, https, s3): copied once while they are checked, then read by ranges.

http.client follows no redirect and sends no credentials, so nothing outside the addresses that a study allows is contacted. s3 goes
through s3fs, with the credentials and the endpoint of the environment.

Invariant: a failed request is tried again here and nowhere else, and ends as a ShardError that names the address. The bytes are checked
by the caller, who knows their digest.
"""

import hashlib
import http.client
import importlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Protocol, TypeVar
from urllib.parse import urlsplit

from merge_service.errors import UserError
from workers.data.manifest import ShardInfo
from workers.data.tarscan import ShardError

TRIES, FIRST_PAUSE = 5, 0.2
TIMEOUT_SECONDS = 30
CHUNK = 1 << 20
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_KNOWN = {404: "missing", 410: "missing"}
_connections = threading.local()
Answer = TypeVar("Answer")


class _Again(Exception):
    """A failure that may pass."""


class _Bucket(Protocol):
    def cat_file(self, path: str, start: int, end: int) -> bytes: ...


def read_range(address: str, offset: int, length: int) -> bytes:
    """`length` bytes of a shard from `offset` on. Raises ShardError (missing, cut, forbidden)."""

    def once() -> bytes:
        data = (
            _of_s3(address, offset, length)
            if address.startswith("s3://")
            else _of_http(address, offset, length)
        )
        if len(data) != length:
            raise ShardError(address, "cut", f"it ends inside the sample at byte {offset}")
        return data

    return _retried(address, once)


def copy_shard(address: str, stated: ShardInfo, target: Path) -> None:
    """Write a shard to `target`. Raises ShardError (missing, cut, flipped) if its bytes are not what its manifest states."""
    digest, at = hashlib.sha256(), 0
    with target.open("wb") as file:
        while at < stated.bytes:
            data = read_range(address, at, min(CHUNK, stated.bytes - at))
            digest.update(data)
            file.write(data)
            at += len(data)
    if digest.hexdigest() != stated.sha256:
        raise ShardError(
            address,
            "flipped",
            f"its bytes differ from those the manifest states (sha256 {stated.sha256[:12]}...)",
        )


def _retried(address: str, once: Callable[[], Answer]) -> Answer:
    pause = FIRST_PAUSE
    for attempt in range(TRIES):
        try:
            return once()
        except _Again as error:
            if attempt == TRIES - 1:
                raise ShardError(
                    address, "missing", f"it cannot be read ({error})", "Check the server, then run again."
                ) from None
        time.sleep(pause * (1 + random.random()))
        pause *= 2
    raise AssertionError("unreachable")


def _of_http(address: str, offset: int, length: int) -> bytes:
    last = offset + length - 1
    headers = {"Range": f"bytes={offset}-{last}", "Accept-Encoding": "identity"}
    with _answer(address, headers) as answer:
        if answer.status in _BUSY:
            raise _Again(f"status {answer.status}")
        if answer.status != 206:
            raise _refused(address, answer.status, offset)
        if not (answer.getheader("Content-Range") or "").startswith(f"bytes {offset}-{last}/"):
            raise ShardError(address, "cut", f"it ends inside the sample at byte {offset}")
        return answer.read(length + 1)


def _refused(address: str, status: int, offset: int) -> ShardError:
    if status == 200:
        return ShardError(
            address,
            "forbidden",
            "the server ignores ranges",
            "Use a server that answers range requests, or copy the shards.",
        )
    if status == 416:
        return ShardError(address, "cut", f"it ends before byte {offset}")
    redirected = " (a redirect, which is not followed: write the address that it leads to)" * (
        300 <= status < 400
    )
    return ShardError(
        address,
        _KNOWN.get(status, "forbidden"),
        f"the server answers {status}{redirected}",
        "Check the address.",
    )


@contextmanager
def _answer(address: str, headers: dict[str, str]) -> Iterator[http.client.HTTPResponse]:
    """The answer to one request over this thread's connection, which is closed unless the answer was read to its end."""
    parts = urlsplit(address)
    held: dict[str, http.client.HTTPConnection] = _connections.__dict__.setdefault("held", {})
    origin = f"{parts.scheme}://{parts.netloc}"
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = held.pop(origin, None) or kind(parts.netloc, timeout=TIMEOUT_SECONDS)
    try:
        connection.request("GET", parts.path, headers=headers)
        answer = connection.getresponse()
        yield answer
        whole = answer.isclosed()
    except (OSError, http.client.HTTPException) as error:
        connection.close()
        raise _Again(f"{type(error).__name__}: {error}") from None
    except BaseException:
        connection.close()
        raise
    if whole:
        held[origin] = connection
    else:
        connection.close()


def _of_s3(address: str, offset: int, length: int) -> bytes:
    try:
        return bytes(_bucket().cat_file(address, start=offset, end=offset + length))
    except FileNotFoundError:
        raise ShardError(address, "missing", "no such object") from None
    except PermissionError as error:
        raise ShardError(
            address, "forbidden", str(error)[:200], "Check the credentials in the environment."
        ) from None
    except UserError:
        raise
    except Exception as error:  # botocore has errors of its own, which are no OSError
        said = f"{type(error).__name__}: {error!s:.200}"
        if "Credentials" in type(error).__name__:
            raise ShardError(
                address, "forbidden", said, "Give credentials in the environment of every node."
            ) from None
        raise _Again(said) from None


@cache
def _bucket() -> _Bucket:
    try:
        system: _Bucket = importlib.import_module("s3fs").S3FileSystem()
    except ImportError:
        raise UserError("shards at s3:// need s3fs; install temporal-merge[s3]") from None
    return system
