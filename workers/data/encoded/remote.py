"""Shards at an address (http, https, s3): copied once while they are checked, then read by ranges.

No redirect is followed and no credentials are sent over http, so nothing outside the addresses that a study allows is contacted. s3 goes
through s3fs, with the credentials and the endpoint of the environment.

Invariant: a failed request is tried again here and nowhere else, and ends as a ShardError that names the address. The bytes are checked
by the caller, who knows their digest.
"""

import hashlib
import importlib
from functools import cache, partial
from pathlib import Path
from typing import Protocol

from merge_service.errors import UserError
from merge_service.files import web
from workers.data.manifest import ShardInfo
from workers.data.tarscan import ShardError

CHUNK = 1 << 20
_KNOWN = {404: "missing", 410: "missing"}


class _Bucket(Protocol):
    def cat_file(self, path: str, start: int, end: int) -> bytes: ...


def read_range(address: str, offset: int, length: int) -> bytes:
    """`length` bytes of a shard from `offset` on. Raises ShardError (missing, cut, forbidden)."""
    way = _of_s3 if address.startswith("s3://") else _of_http
    try:
        data = web.tried(partial(way, address, offset, length))
    except web.Passing as error:
        raise ShardError(
            address, "missing", f"it cannot be read ({error})", "Check the server, then run again."
        ) from None
    if len(data) != length:
        raise _ends(address, offset)
    return data


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


def _of_http(address: str, offset: int, length: int) -> bytes:
    answer = web.get_range(address, offset, offset + length, {}, follow=False)
    if answer.status != 206:
        raise _refused(address, answer.status, offset)
    if answer.size_of_whole(offset, offset + length) is None:
        raise _ends(address, offset)
    return answer.data


def _ends(address: str, offset: int) -> ShardError:
    return ShardError(address, "cut", f"it ends inside the sample at byte {offset}")


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
        raise web.Passing(said) from None


@cache
def _bucket() -> _Bucket:
    try:
        system: _Bucket = importlib.import_module("s3fs").S3FileSystem()
    except ImportError:
        raise UserError("shards at s3:// need s3fs; install temporal-merge[s3]") from None
    return system
