"""Routes of the log: its entries, exactly as they are chained, and its head."""

from itertools import islice
from typing import Annotated

from fastapi import APIRouter, Depends, Query

from merge_service.live import plain
from pipeline.service.http.door import require
from pipeline.service.http.live.live import Live
from pipeline.service.http.live.schemas import EntryShown, HeadShown, LogPage
from pipeline.service.http.problems import Problem
from pipeline.service.tokens import Token

MOST_ENTRIES = 500


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
        if not token.sees_all:
            raise Problem("role.too_low", "a token that is bound to owners does not read the log")
        found = [EntryShown.model_validate(plain(one)) for one in islice(live.home.log.entries(after), limit)]
        return LogPage(entries=found, head=_head(live))

    @routes.get("/v1/log/head", dependencies=[reader], summary="The newest entry of the log")
    def head() -> HeadShown:
        return _head(live)

    return routes


def _head(live: Live) -> HeadShown:
    state = live.state()
    return HeadShown(seq=state.seq, sha256=state.head)
