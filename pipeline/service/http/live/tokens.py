"""Routes of tokens: issue, list, revoke.

Invariant: the text of a token is in one answer and nowhere else. A token counts only after its entry in the log; one that is revoked
counts no more before its entry.
"""

from typing import Annotated

from fastapi import APIRouter, Depends, Path

from merge_service.live import TokenIssued
from pipeline.service.http.door import require
from pipeline.service.http.live.live import Live
from pipeline.service.http.live.schemas import TokenBody, TokenIssuedShown, TokenList, TokenShown
from pipeline.service.http.problems import Problem
from pipeline.service.tokens import Token, drafted


def router(live: Live) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["tokens"])
    operator = Depends(require("operator"))

    @routes.get("/v1/tokens", dependencies=[operator], summary="All tokens, without their secrets")
    def every() -> TokenList:
        return TokenList(tokens=[TokenShown.of(one) for one in live.tokens.every()])

    @routes.post("/v1/tokens", status_code=201, summary="Issue a token, whose text is shown this once")
    def issue(body: TokenBody, token: Annotated[Token, operator]) -> TokenIssuedShown:
        bounds = {
            "tasks": None if body.tasks is None else tuple(body.tasks),
            "owners": None if body.owners is None else tuple(body.owners),
            "per_day": body.per_day,
        }
        text, new = drafted(body.role, body.days, body.note, bounds)
        live.operations(token).token_issued(
            TokenIssued(
                new.id,
                new.role,
                new.sha256,
                int(1000 * (new.expires or 0)),
                new.owners or (),
                new.tasks or (),
                new.per_day,
                new.note,
            )
        )
        live.tokens.add(new)
        return TokenIssuedShown(token=text, **TokenShown.of(new).model_dump())

    @routes.delete(
        "/v1/tokens/{number}", status_code=204, summary="Revoke a token; it opens nothing from then on"
    )
    def revoke(
        number: Annotated[str, Path(pattern="^[0-9a-f]{12}$")], token: Annotated[Token, operator]
    ) -> None:
        others = [one for one in live.tokens.every() if one.is_operator and one.id != number]
        if not others:
            raise Problem("tokens.last")
        if not live.tokens.revoke(number):
            raise Problem("tokens.unknown")
        live.operations(token).token_revoked(number, "revoked by an operator")

    return routes
