"""What a service answers when it does not: problem details (RFC 9457) with stable codes.

Every code is in `CODES`, has a page at its `type`, and never changes its meaning within /v1.
Invariant: an error answer names neither a path of this machine nor a line of code.
"""

import http
import logging
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from merge_service.live import Refused
from pipeline.errors import StorageFull

MEDIA_TYPE = "application/problem+json"
PLACE = "/problems/"
log = logging.getLogger("temporal_merge.service")

CODES: dict[str, tuple[int, str, str]] = {
    "request.invalid": (422, "The request is not as described", "Compare it with /openapi.json; `errors` says where it differs."),
    "request.malformed": (400, "The request cannot be read", "Send the body as its Content-Type says."),
    "request.unknown": (404, "There is no such address", "Compare the path with /openapi.json."),
    "request.method": (405, "The address does not take this method", "The Allow header lists those it takes."),
    "request.too_large": (413, "The body is larger than allowed", "`detail` names the limit; send less at once."),
    "request.slow": (408, "The body came too slowly", "Send it again over a better connection, or in smaller parts."),
    "request.media_type": (415, "The body is of a type that is not taken", "Send one of the types that `detail` lists."),
    "host.unknown": (421, "The Host header names another service", "Address the service by a name of listen.hosts."),
    "token.missing": (401, "A token is needed", "Send `Authorization: Bearer tmk_...`."),
    "token.unknown": (401, "The token is not one of this service", "Ask the operator for one."),
    "token.expired": (401, "The token has expired", "Ask the operator for a new one."),
    "token.revoked": (401, "The token was revoked", "Ask the operator for a new one."),
    "role.too_low": (403, "The token's role does not include this", "`detail` names the role that does."),
    "model.none": (503, "No model is loaded yet", "Try again after the seconds of Retry-After."),
    "model.unknown": (404, "There is no such model", "GET /v1/models/champion names what is served."),
    "model.not_finite": (503, "The model gave numbers that are not finite", "Tell the operator; roll back to an earlier t."),
    "upload.unknown": (404, "There is no such upload", "Announce the files again; what came before 48 hours is forgotten."),
    "upload.files": (422, "These are not the files of a checkpoint", "Send one *.safetensors, shards with their index, or an adapter."),
    "upload.part": (422, "The part does not fit what was announced", "GET the upload: it lists the parts that are missing."),
    "upload.digest": (422, "The bytes are not those of the digest", "Send the part, or the file, again with the digest of its bytes."),
    "upload.conflict": (409, "The part is there already, with other bytes", "Announce the files anew if they have changed."),
    "upload.incomplete": (409, "Parts of the upload are missing", "GET the upload: it lists them."),
    "upload.busy": (409, "Another request works on this upload", "Try again after the seconds of Retry-After."),
    "upload.too_large": (413, "The files are larger than this service takes", "`detail` names the limit."),
    "upload.unfit": (422, "The files do not make a checkpoint", "`detail` says why."),
    "limit.uploads": (429, "Too many uploads are open", "Finish or delete one, or try again later."),
    "limit.owner": (429, "The owner has sent as many experts as allowed in 24 hours", "Try again later."),
    "limit.token": (429, "The token has sent as many experts as allowed in 24 hours", "Try again later."),
    "limit.waiting": (503, "As many arrivals wait as may", "Try again after the seconds of Retry-After."),
    "arrival.unknown": (404, "There is no such arrival", "GET /v1/arrivals lists those there are."),
    "arrival.state": (409, "The arrival's state does not allow this", "`detail` says which state it has."),
    "arrival.unfit": (409, "The expert cannot be merged at all", "Send another one; no release makes it fit."),
    "arrival.denied": (403, "These bytes were purged, and are refused", "Send another expert."),
    "ticket.invalid": (422, "The ticket is not one of this service", "GET /v1/next gives one."),
    "ticket.task": (422, "The ticket is for another task", "GET /v1/next gives one for each task."),
    "ticket.expired": (422, "The ticket has expired", "GET /v1/next gives another."),
    "ticket.used": (409, "The ticket came back with another expert", "GET /v1/next gives another."),
    "start.none": (503, "What the next expert starts from is being made", "Try again after the seconds of Retry-After."),
    "idempotency.reused": (422, "The Idempotency-Key came with another request", "Use a new key for every request."),
    "task.unknown": (422, "Experts of this task are not taken", "`detail` lists the tasks."),
    "task.forbidden": (403, "The token is not for this task", "Ask the operator for one that is."),
    "owner.forbidden": (403, "The token is not for this owner", "Ask the operator for one that is."),
    "t.unknown": (404, "There is no such time step", "GET /v1/status says how many experts are accepted."),
    "head.moved": (412, "The log has gone on since", "Look again, and decide on what is there now."),
    "removal.running": (409, "A removal is under way", "Send the same request again after it."),
    "descendants.undecided": (409, "Later experts were trained from weights that held it", "Decide about them: descendants=keep, remove or retrain."),
    "tokens.unknown": (404, "There is no token with this id", "GET /v1/tokens lists them."),
    "tokens.last": (409, "It is the last operator token", "Issue another one first."),
    "range.unsatisfiable": (416, "The file has no such bytes", "The Content-Range header has its length."),
    "labels.missing": (422, "Neither labels nor a label set is given", "Give labels, or label_set with the name of a registered set."),
    "labels.wrong": (422, "These labels cannot classify", "`detail` says why."),
    "labels.too_many": (422, "More labels or prompts than one request may bring", "Register them as a label set, or send fewer."),
    "labels.unknown": (404, "There is no label set of this name", "GET /v1/label-sets lists those there are."),
    "picture.missing": (422, "The request holds no picture", "Send one as the body, or as parts named image."),
    "picture.too_many": (413, "More pictures than one request may bring", "Send them in several requests."),
    "picture.too_large": (413, "The file of a picture is larger than allowed", "Send a smaller one; `detail` names the limit."),
    "picture.pixels": (422, "A picture has more pixels than allowed", "Scale it down; `detail` names the limit."),
    "picture.scans": (422, "A JPEG has more scans than allowed", "Save it anew."),
    "picture.unreadable": (422, "A picture cannot be decoded", "Send JPEG, PNG or WebP that is whole."),
    "service.busy": (503, "The queue is full", "Try again after the seconds of Retry-After."),
    "service.slow": (503, "The answer took longer than allowed", "Try again after the seconds of Retry-After."),
    "service.full": (507, "The disk of the service is full", "Tell the operator; what is registered already goes on."),
    "service.ending": (503, "The process is ending", "Try again at once."),
    "service.failed": (500, "This is a defect of the service", "Send the operator the instance; its log has the details."),
}  # fmt: skip
"""Code -> (status, title, what to do)."""

RETRY = {"limit.uploads": 60, "limit.owner": 3600, "limit.token": 3600, "limit.waiting": 60, "upload.busy": 1}
"""Seconds of Retry-After, of refusals that pass by themselves."""


class Mistake(BaseModel):
    """One of several mistakes: where (JSON pointer, RFC 6901) and what."""

    pointer: str
    detail: str


class ProblemBody(BaseModel):
    """Problem details (RFC 9457)."""

    type: str = Field(description="A page about this kind of problem, relative to the service")
    title: str
    status: int
    detail: str
    instance: str = Field(description="Names this occurrence in the service's log")
    code: str = Field(description="Stable name of the kind of problem")
    errors: list[Mistake] = []


class Problem(HTTPException):
    """An error with a code of `CODES`. An HTTPException, so that FastAPI passes it on from wherever a body is read."""

    def __init__(
        self,
        code: str,
        detail: str = "",
        errors: Sequence[Mistake] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        status, title, _ = CODES[code]
        super().__init__(status, detail or title, dict(headers or {}))
        self.code, self.errors = code, tuple(errors)

    def response(self) -> Response:
        """The answer that says so."""
        status, title, _ = CODES[self.code]
        body = ProblemBody(
            type=PLACE + self.code, title=title, status=status, detail=str(self.detail),
            instance=f"urn:uuid:{_uuid()}", code=self.code, errors=list(self.errors),
        )  # fmt: skip
        if status >= 500:
            log.warning("%s: %s (%s)", self.code, self.detail, body.instance)
        return JSONResponse(body.model_dump(), status, self.headers, media_type=MEDIA_TYPE)


def busy(code: str, seconds: int, detail: str = "") -> Problem:
    """A problem of 503 with Retry-After."""
    return Problem(code, detail, headers={"retry-after": str(seconds)})


def unexpected(error: Exception, where: str) -> Problem:
    """What is said about a defect; the log has the rest."""
    log.error("%s: %s", where, type(error).__name__, exc_info=error)
    return Problem("service.failed", "the service failed; its log has the details")


def install(app: FastAPI) -> None:
    """Let every error of an application be a problem, and describe each code on a page of its own."""

    async def problem(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return (error if isinstance(error, Problem) else _of_framework(error)).response()

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return not_valid(error.errors()).response()

    async def defect(request: Request, error: Exception) -> Response:
        return unexpected(error, request.method).response()

    app.add_exception_handler(Exception, defect)

    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        seconds = RETRY.get(error.code)
        headers = {} if seconds is None else {"retry-after": str(seconds)}
        return Problem(error.code, str(error), headers=headers).response()

    async def full(_: Request, error: Exception) -> Response:
        return Problem("service.full").response()

    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(StorageFull, full)
    app.add_exception_handler(HTTPException, problem)
    app.add_exception_handler(RequestValidationError, invalid)

    @app.get(PLACE + "{code}", include_in_schema=False)
    async def page(code: str) -> Response:
        if code not in CODES:
            raise Problem("request.unknown")
        status, title, do = CODES[code]
        return PlainTextResponse(f"{code} ({status})\n{title}.\n{do}\n")


def not_valid(found: Sequence[Any]) -> Problem:
    """The problem of pydantic's errors; what was sent is not repeated."""
    mistakes = [Mistake(pointer=_pointer(one["loc"]), detail=str(one["msg"])) for one in found[:20]]
    said = "; ".join(f"{one.pointer}: {one.detail}" for one in mistakes[:3])
    return Problem("request.invalid", said, mistakes)


def _of_framework(error: HTTPException) -> Problem:
    """What Starlette and FastAPI raise by themselves."""
    code = {404: "request.unknown", 405: "request.method", 413: "request.too_large"}.get(error.status_code)
    if code is None:
        code = "request.malformed" if error.status_code < 500 else "service.failed"
    detail = str(error.detail) if code == "request.malformed" else ""
    return Problem(code, detail, headers=error.headers)


def _pointer(loc: Sequence[int | str]) -> str:
    parts = (str(part).replace("~", "~0").replace("/", "~1") for part in loc)
    return "".join(f"/{part}" for part in parts)


def _uuid() -> str:
    text = secrets.token_hex(16)
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def status_name(status: int) -> str:
    """The standard phrase of a status."""
    return http.HTTPStatus(status).phrase
