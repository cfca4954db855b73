"""Routes of operations: release, promote, reject, roll back, remove. Each appends one entry; what work it needs is done by the working process.

Invariant: an operation is decided on the newest state, and with `if_head` on the very state that its caller saw.
"""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query

from merge_service.live import Removed, arrival_called
from pipeline.service.http.door import require
from pipeline.service.http.live.live import Live
from pipeline.service.http.live.schemas import ArrivalShown, RemovalAsked, RollbackBody, Why
from pipeline.service.http.problems import Problem
from pipeline.service.http.schemas import Standing
from pipeline.service.tokens import Token

Id = Annotated[str, Path(pattern="^a-[0-9]{6,12}$")]
PURGE_WAIT = 25.0
"""Seconds that a purge waits for the removal before it; after them the same request is sent again."""


def router(live: Live) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["operations"])
    operator, submitter = Depends(require("operator")), Depends(require("submitter"))

    @routes.post(
        "/v1/arrivals/{number}/release", summary="Let an arrival go on in spite of why it was stopped"
    )
    def release(number: Id, why: Why, token: Annotated[Token, operator]) -> ArrivalShown:
        live.operations(token, why.if_head).release(number, why.reason)
        return _shown(live, number)

    @routes.post(
        "/v1/arrivals/{number}/promote",
        summary="Serve what an accepted arrival brought; let a held one go on",
    )
    def promote(number: Id, why: Why, token: Annotated[Token, operator]) -> ArrivalShown:
        live.operations(token, why.if_head).promote(number, why.reason)
        return _shown(live, number)

    @routes.post("/v1/arrivals/{number}/reject", summary="Refuse a held candidate")
    def reject(number: Id, why: Why, token: Annotated[Token, operator]) -> ArrivalShown:
        live.operations(token, why.if_head).reject(number, why.reason)
        return _shown(live, number)

    @routes.post("/v1/rollback", summary="Serve another time step; the accepted sequence stays")
    def rollback(body: RollbackBody, token: Annotated[Token, operator]) -> Standing:
        live.operations(token, body.if_head).roll_back(body.t, body.reason, body.hold)
        return live.standing()

    @routes.delete(
        "/v1/arrivals/{number}",
        status_code=202,
        summary="Take an expert out of all merges, or withdraw one that is not accepted; its submitter may withdraw",
    )
    async def remove(
        number: Id, token: Annotated[Token, submitter], asked: Annotated[RemovalAsked, Query()]
    ) -> ArrivalShown:
        await asyncio.to_thread(_remove, live, number, token, asked)
        if asked.purge:
            await live.until(lambda state: state.removal is None, PURGE_WAIT)
            await asyncio.to_thread(_purge, live, number, token, asked.reason)
        state = live.state()
        return ArrivalShown.of(state, state.arrivals[number], token.sees_all)

    return routes


def _remove(live: Live, number: str, token: Token, asked: RemovalAsked) -> None:
    """Append the removal. Raises Refused; Problem for a submitter who asks for more than to withdraw an arrival of its own."""
    one = arrival_called(live.state(), number)
    if not token.may("operator"):
        if one.actor != token.id:
            raise Problem("role.too_low", "another's arrival is removed by an operator")
        if one.status == "accepted" or asked.purge or asked.force or asked.descendants != "none":
            raise Problem("role.too_low", "what is accepted is removed by an operator")
    data = Removed(asked.reason, asked.force, asked.descendants)
    live.operations(token, asked.if_head).remove(number, data)


def _purge(live: Live, number: str, token: Token, reason: str) -> None:
    """Append the purge, unless a gate has kept the expert. Raises Refused while the removal is under way."""
    if live.state().arrivals[number].status != "accepted":
        live.operations(token).purge(number, reason)


def _shown(live: Live, number: str) -> ArrivalShown:
    state = live.state()
    return ArrivalShown.of(state, state.arrivals[number], True)
