"""Routes of uploads: files in parts, with digests, that go on after any break.

Invariant: what is too much is refused when it is announced, before a byte of it comes; an answer to a part says that it is on disk.
"""

import base64
import hashlib
import re
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Path, Request, Response
from starlette.concurrency import run_in_threadpool

from merge_service.live import Refused
from pipeline.service.http.door import require
from pipeline.service.http.live.live import Live, check_bounds
from pipeline.service.http.live.schemas import UploadBody, UploadShown
from pipeline.service.http.problems import Problem
from pipeline.service.intake.uploads import ID, Announced, Upload
from pipeline.service.tokens import Token

Number = Annotated[str, Path(pattern=f"^{ID}$")]
Part = Annotated[int, Path(ge=0, le=10**9)]
FileName = Annotated[str, Path(max_length=200)]
_DIGEST = re.compile(r"(?:^|,)\s*sha-256=:([A-Za-z0-9+/]{43}=):")
_BYTES = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


def router(live: Live) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["uploads"])
    submitter = Depends(require("submitter"))

    @routes.post(
        "/v1/uploads",
        status_code=201,
        summary="Announce files; the same announcement again is the same upload",
        responses={200: {"model": UploadShown, "description": "It was announced before"}},
    )
    def announce(body: UploadBody, response: Response, token: Annotated[Token, submitter]) -> UploadShown:
        check_bounds(token, body.task)
        operations, state = live.operations(token), live.state()
        operations.check_task(body.task)
        operations.check_room(state)
        if denied := [one for one in body.files if one.sha256 in state.denied]:
            raise Refused("arrival.denied", f"the bytes of {denied[0].name[:80]} were purged and are refused")
        files = [Announced(one.name, one.bytes, one.sha256) for one in body.files]
        upload, new = live.uploads.open(token.id, body.task, files)
        response.status_code = 201 if new else 200
        response.headers["location"] = f"/v1/uploads/{upload.id}"
        return _shown(live, upload)

    @routes.get("/v1/uploads/{number}", summary="What is missing of an upload")
    def show(number: Number, token: Annotated[Token, submitter]) -> UploadShown:
        return _shown(live, live.uploads.get(number, token.id))

    @routes.delete("/v1/uploads/{number}", status_code=204, summary="Forget an upload")
    def drop(number: Number, token: Annotated[Token, submitter]) -> None:
        live.uploads.drop(live.uploads.get(number, token.id))

    @routes.put(
        "/v1/uploads/{number}/parts/{name}/{part}",
        status_code=204,
        summary="One part of a file, with Content-Digest (RFC 9530)",
        openapi_extra=_BYTES,
    )
    async def put(
        number: Number,
        name: FileName,
        part: Part,
        request: Request,
        token: Annotated[Token, submitter],
        content_digest: Annotated[str | None, Header(max_length=1000)] = None,
    ) -> None:
        upload = await run_in_threadpool(live.uploads.get, number, token.id)
        data = await request.body()
        stated = _DIGEST.search(content_digest or "")
        if stated is None:
            raise Problem("upload.digest", "Content-Digest: sha-256=:<base64>: is needed")
        if hashlib.sha256(data).digest() != base64.b64decode(stated[1]):
            raise Problem("upload.digest", "the bytes that came do not have the digest that was stated")
        await run_in_threadpool(live.uploads.put, upload, name, part, data)

    return routes


def _shown(live: Live, upload: Upload) -> UploadShown:
    return UploadShown(id=upload.id, part_bytes=upload.part_bytes, missing=live.uploads.missing(upload))
