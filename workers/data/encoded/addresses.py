"""Addresses of shards: which ones may be written down, and whether a study allows one.

A manifest comes with a data set, so whoever wrote it chose its addresses. A study states the addresses that it trusts.

Invariant: an address is plain: a scheme, a host or bucket, and a path without a step upwards. What is compared is what is requested.
"""

import re
from collections.abc import Sequence

from merge_service.errors import UserError

_PLAIN = re.compile(r"(https?|s3)://([a-z0-9][a-z0-9.-]*(?::[0-9]{1,5})?)((?:/[A-Za-z0-9._~-]+)*)/")


def plain(address: str) -> str:
    """The address of a folder, with one `/` at its end.

    Raises ValueError for what is no plain address: another scheme, a user, a query, a `..`, an escape, an upper-case host.
    """
    found = f"{address.rstrip('/')}/"
    match = _PLAIN.fullmatch(found)
    if match is None or any(part in (".", "..") for part in match[3].split("/")):
        raise ValueError(
            f"{address[:200]!r} is no plain address; write https://HOST/PATH/, http://HOST/PATH/ or s3://BUCKET/PATH/, without user, "
            "query or escapes, the host in lower case"
        )
    return found


def check_allowed(address: str, allowed: Sequence[str], what: str) -> None:
    """Raise UserError unless `address` is one of the plain addresses that a study allows, or below one."""
    if not any(address.startswith(one) for one in allowed):
        raise UserError(
            f"{what} has its shards at {address}, which data.addresses does not allow; check the address, then add it "
            f"(data: {{addresses: [{address}]}}), or copy the shards"
        )
