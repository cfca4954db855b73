"""Routes of start tickets: the weights that the next expert of a task starts from, and what proves it.

Invariant: a ticket names weights that can be downloaded when it is given; a name from a request is looked up and never becomes a path.
"""

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Request, Response

from merge_service.checkpoints import WEIGHTS_FILE
from merge_service.live import plain
from pipeline.service.http.door import require
from pipeline.service.http.live.live import Live, check_bounds
from pipeline.service.http.live.schemas import Start
from pipeline.service.http.models import BINARY, sent
from pipeline.service.http.problems import Problem, busy
from pipeline.service.http.schemas import File
from pipeline.service.models import places_of
from pipeline.service.tokens import Token
from pipeline.store.artifact import RECORD_FILE, Record

Sha256 = Annotated[str, Path(pattern="^[0-9a-f]{64}$")]
FileName = Annotated[str, Path(max_length=200)]


def router(live: Live) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["start tickets"])
    submitter = Depends(require("submitter"))

    @routes.get("/v1/next", summary="What the next expert of a task starts from, with a ticket")
    def start(
        token: Annotated[Token, submitter], task: Annotated[str, Query(min_length=1, max_length=200)]
    ) -> Start:
        check_bounds(token, task)
        live.operations(token).check_task(task)
        state = live.state()
        record = None if state.removal else live.home.models.start(places_of(state))
        if record is None:
            raise busy("start.none", 5)
        sha256 = record.sha256(WEIGHTS_FILE) or ""
        text, ticket = live.tickets.issue(state.seq, task, sha256)
        return Start(
            ticket=text, expires=ticket.expires, seq=state.seq, t=state.t, sha256=sha256,
            strategy=plain(live.home.config.timeline), files=_files(record), place=f"/v1/starts/{sha256}/files/",
        )  # fmt: skip

    @routes.get(
        "/v1/starts/{sha256}/files/{name}",
        dependencies=[submitter],
        responses=BINARY,
        response_class=Response,
        summary="A file of weights to start from, whole or in ranges",
    )
    def file(sha256: Sha256, name: FileName, request: Request) -> Response:
        record = live.home.models.known(live.state(), sha256)
        described = next((one for one in _files(record) if one.name == name), None) if record else None
        if record is None or described is None:
            raise Problem("model.unknown")
        return sent(request, record.path / described.name, described, {})

    return routes


def _files(record: Record) -> list[File]:
    """The files of a weights directory."""
    every = sorted(record.files.items())
    return [File(name=name, **entry) for name, entry in every if name != RECORD_FILE and "/" not in name]
