"""Routes of the log: its entries, exactly as they are chained, its head, and entries as they come (server-sent events).

Invariant: an event is an entry, and its id the number of the entry; so a client that comes back with the last id misses nothing.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from itertools import islice
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query
from fastapi.responses import StreamingResponse

from merge_service.live import Entry, plain
from pipeline.service.http.door import require
from pipeline.service.http.live.live import MOST_WAIT, Live
from pipeline.service.http.live.schemas import EntryShown, HeadShown, LogPage
from pipeline.service.http.problems import Problem
from pipeline.service.tokens import Token

MOST_ENTRIES = 500
STREAM = "text/event-stream"


def router(live: Live) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["log"])
    reader = Depends(require("reader"))

    @routes.get("/v1/log", summary="Entries of the log after a number")
    def entries(
        token: Annotated[Token, reader],
        after: Annotated[int, Query(ge=0, lt=10**12)] = 0,
        limit: Annotated[int, Query(ge=1, le=MOST_ENTRIES)] = 100,
    ) -> LogPage:
        _check_sees(token)
        found = [EntryShown.model_validate(plain(one)) for one in islice(live.home.log.entries(after), limit)]
        return LogPage(entries=found, head=_head(live))

    @routes.get("/v1/log/head", dependencies=[reader], summary="The newest entry of the log")
    def head() -> HeadShown:
        return _head(live)

    @routes.get(
        "/v1/events",
        summary="Entries of the log as they come, as server-sent events; a stream ends after `wait` seconds",
        response_class=StreamingResponse,
        responses={200: {"description": "Events", "content": {STREAM: {"schema": {"type": "string"}}}}},
    )
    async def events(
        token: Annotated[Token, reader],
        after: Annotated[int | None, Query(ge=0, lt=10**12)] = None,
        wait: Annotated[int, Query(ge=0, le=MOST_WAIT)] = MOST_WAIT,
        last_event_id: Annotated[str | None, Header(pattern="^[0-9]{1,12}$")] = None,
    ) -> StreamingResponse:
        _check_sees(token)
        first = int(last_event_id) if last_event_id is not None else after
        if first is None:
            first = (await asyncio.to_thread(live.state)).seq
        return StreamingResponse(
            _stream(live, first, wait), media_type=STREAM, headers={"cache-control": "no-store"}
        )

    return routes


async def _stream(live: Live, seen: int, wait: float) -> AsyncIterator[str]:
    """Events after entry `seen`; those that are there already at once, then others as they come."""
    last = time.monotonic() + wait
    yield "retry: 1000\n\n"
    while True:
        for one in await asyncio.to_thread(_after, live, seen):
            seen = one.seq
            yield f"id: {one.seq}\nevent: {one.kind}\ndata: {json.dumps(plain(one))}\n\n"
        left = last - time.monotonic()
        if left <= 0 or live.ending.is_set():
            return
        await live.until(lambda state, seen=seen: state.seq > seen, left)  # type: ignore[misc]


def _after(live: Live, seen: int) -> list[Entry]:
    return [*islice(live.home.log.entries(seen), MOST_ENTRIES)]


def _check_sees(token: Token) -> None:
    """Raise Problem for a token that does not read the log."""
    if not token.sees_all:
        raise Problem("role.too_low", "a token that is bound to owners does not read the log")


def _head(live: Live) -> HeadShown:
    state = live.state()
    return HeadShown(seq=state.seq, sha256=state.head)
