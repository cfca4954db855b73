"""All routes of a live service, and how large their bodies may be.

Invariant: a body that is no part of an upload is small, whatever it claims.
"""

from collections.abc import Mapping

from fastapi import APIRouter

from pipeline.service.http.live import acts, arrivals, history, starts, tokens, uploads
from pipeline.service.http.live.live import Live
from pipeline.service.intake.uploads import PART_BYTES

_SMALL = 64 << 10
BODIES: Mapping[str, int] = {
    "/v1/uploads/": PART_BYTES, "/v1/uploads": 256 << 10, "/v1/arrivals": _SMALL, "/v1/rollback": _SMALL, "/v1/tokens": 512 << 10,
}  # fmt: skip
"""Bytes of a body below a path; the first that fits counts."""


def routers(live: Live) -> tuple[APIRouter, ...]:
    """The routers."""
    return tuple(one.router(live) for one in (uploads, arrivals, acts, starts, history, tokens))
