"""Routes of arrivals: an expert comes, and what became of it.

Invariant: 202 says that bytes and entry are on disk. The same request again, by its key or by its bytes, is the same arrival.
"""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Path, Query, Response

from merge_service.live import (
    Arrival,
    Received,
    Refused,
    State,
    ancestors,
    arrival_called,
    descendants,
    digest,
    parents,
)
from pipeline.service.http.door import require
from pipeline.service.http.live.live import MOST_WAIT, Live, check_bounds
from pipeline.service.http.live.schemas import (
    ArrivalBody,
    ArrivalPage,
    ArrivalShown,
    Came,
    Lineage,
    Status,
)
from pipeline.service.http.problems import Problem
from pipeline.service.intake.tickets import digest_of
from pipeline.service.tokens import Token

Id = Annotated[str, Path(pattern="^a-[0-9]{6,12}$")]
Key = Annotated[
    str | None,
    Header(max_length=200, pattern="^[!-~]+$", description="Names this request, for sending it again"),
]
MOST_SHOWN = 200


def router(live: Live) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["arrivals"])
    reader, submitter = Depends(require("reader")), Depends(require("submitter"))
    known: dict[int | str, dict[str, Any]] = {200: {"model": Came, "description": "It came before"}}

    @routes.post("/v1/arrivals", status_code=202, summary="An uploaded expert arrives", responses=known)
    def arrive(
        body: ArrivalBody, response: Response, token: Annotated[Token, submitter], idempotency_key: Key = None
    ) -> Came:
        return _arrive(live, response, token, Asked(body, idempotency_key))

    @routes.put(
        "/v1/arrivals/{number}/replacement",
        status_code=202,
        summary="An uploaded expert takes the place of an accepted one, if it passes all gates",
        responses=known,
    )
    def replace(
        number: Id,
        body: ArrivalBody,
        response: Response,
        token: Annotated[Token, submitter],
        idempotency_key: Key = None,
    ) -> Came:
        old = arrival_called(live.state(), number)
        if not token.may("operator") and old.actor != token.id:
            raise Problem("role.too_low", "another's arrival is replaced by an operator")
        return _arrive(live, response, token, Asked(body, idempotency_key, number))

    @routes.get("/v1/arrivals", summary="Arrivals in the order they came")
    def several(
        token: Annotated[Token, reader],
        status: Status | None = None,
        task: Annotated[str | None, Query(max_length=200)] = None,
        after: Annotated[str | None, Query(pattern="^a-[0-9]{6,12}$")] = None,
        limit: Annotated[int, Query(ge=1, le=MOST_SHOWN)] = 50,
    ) -> ArrivalPage:
        state, first = live.state(), int(after[2:]) if after else 0
        found = [
            one
            for one in state.arrivals.values()
            if one.seq > first and status in (None, state.shown(one.id)) and task in (None, one.task)
        ]
        page = found[:limit]
        shown = [ArrivalShown.of(state, one, token.sees_all) for one in page]
        return ArrivalPage(arrivals=shown, next=page[-1].id if len(found) > limit else None)

    @routes.get("/v1/arrivals/{number}", summary="One arrival; `wait` seconds for it to be decided")
    async def one(
        number: Id, token: Annotated[Token, reader], wait: Annotated[int, Query(ge=0, le=MOST_WAIT)] = 0
    ) -> ArrivalShown:
        state = await live.until(lambda now: arrival_called(now, number).is_final, wait)
        return ArrivalShown.of(state, state.arrivals[number], token.sees_all)

    @routes.get(
        "/v1/arrivals/{number}/lineage",
        dependencies=[Depends(require("reader"))],
        summary="What it descends from, and what from it",
    )
    def lineage(number: Id) -> Lineage:
        state, strategy = live.state(), live.home.config.timeline
        arrival_called(state, number)
        return Lineage(
            id=number, parents=[*parents(state, strategy)[number]], ancestors=[*ancestors(state, strategy, number)],
            descendants=[*descendants(state, strategy, number)],
        )  # fmt: skip

    return routes


@dataclass(frozen=True)
class Asked:
    """A request for an arrival, with its key, and the arrival that it would replace."""

    body: ArrivalBody
    key: str | None
    replaces: str | None = None

    def digest(self) -> str:
        """What a request with the same key must be equal in."""
        return digest([self.body.model_dump(mode="json"), self.replaces])


def _arrive(live: Live, response: Response, token: Token, asked: Asked) -> Came:
    """Take an arrival in. Raises Refused, Problem."""
    body, state = asked.body, live.state()
    key = f"{token.id}:{asked.key}" if asked.key else ""
    if key in state.keys and key:
        return _known(state, response, key, asked)
    owner = _owner(token, body.owner)
    check_bounds(token, body.task, owner)
    operations, quota = live.operations(token), live.quota(token)
    operations.check_task(body.task)
    if (before := live.uploads.taken(body.upload, token.id, asked.digest())) is not None:
        return _again(state, response, before)
    upload = live.uploads.get(body.upload, token.id)
    if upload.task != body.task:
        raise Problem("request.invalid", "the upload was announced for another task")
    init, init_seq, ticket = _start(live, state, body)
    try:
        start = partial(live.home.models.under, state, init)
        with live.uploads.taking(upload, live.home.experts, asked.digest(), start) as taking:
            data = Received(
                body.task, taking.taken.sha256, taking.taken.bytes, init, owner, body.license, body.note, origin="upload",
                ticket=ticket, init_seq=init_seq, key=key, body=asked.digest(), replaces=asked.replaces,
                adapter=taking.taken.adapter,
            )  # fmt: skip
            arrived = operations.received(data, quota)
            taking.arrival = arrived.id
    except Refused as refused:
        if refused.code == "arrival.denied":
            live.uploads.drop(upload)
        raise
    state = live.home.log.state
    response.status_code = 202 if arrived.new else 200
    response.headers["location"] = f"/v1/arrivals/{arrived.id}"
    response.headers["ratelimit"] = f'"arrivals";r={quota.left(state, data, token.id)};t=86400'
    return _came(state, arrived.id)


def _known(state: State, response: Response, key: str, asked: Asked) -> Came:
    """The arrival that a request with this key led to."""
    known = state.keys[key]
    if known.body != asked.digest():
        raise Refused(
            "idempotency.reused",
            f"the Idempotency-Key came with another request, which became {known.arrival}",
        )
    return _again(state, response, known.arrival)


def _again(state: State, response: Response, number: str) -> Came:
    """The arrival that this very request led to before."""
    response.status_code = 200
    response.headers["location"] = f"/v1/arrivals/{number}"
    return _came(state, number)


def _came(state: State, number: str) -> Came:
    one: Arrival = state.arrivals[number]
    return Came.model_validate({"id": one.id, "status": state.shown(one.id)})


def _start(live: Live, state: State, body: ArrivalBody) -> tuple[str, int | None, str]:
    """What training started from, the entry that it stands for, and the digest of the ticket. Raises Refused, Problem."""
    if body.init_ticket is None:
        usual = "base" if live.home.config.timeline.init == "base" else "foreign"
        return body.init or usual, None, ""
    if body.init is not None:
        raise Problem("request.invalid", "the ticket says what training started from; leave init out")
    ticket = live.tickets.read(body.init_ticket, body.task)
    init = "base" if ticket.init == state.base.sha256 else ticket.init
    return init, ticket.seq, digest_of(body.init_ticket)


def _owner(token: Token, stated: str | None) -> str:
    """Whose expert it is. Raises Problem where it must be said."""
    if stated is not None:
        return stated
    if token.owners is None:
        return token.note or token.id
    if len(token.owners) != 1:
        raise Problem("request.invalid", f"owner is missing; the token is for {', '.join(token.owners)}")
    return token.owners[0]
