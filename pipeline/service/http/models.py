"""Routes of models to download: what is served, and earlier weights that are kept, with ranges and validators.

A file's ETag is its sha256, so a download that was cut off goes on where it stopped, and never mixes two files.
Invariant: a name from a request is looked up among a model's files, and never becomes a path.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Request, Response
from fastapi import Path as FromPath
from fastapi.responses import FileResponse
from starlette.types import Scope

from merge_service.checkpoints import CONFIG_FILE, WEIGHTS_FILE
from pipeline.service.http.door import require
from pipeline.service.http.problems import Problem
from pipeline.service.http.schemas import File, Manifest, Model
from workers.models.configuration import is_tokenizer_file
from workers.serving.served import Head, Served

Which = Annotated[
    str,
    FromPath(
        pattern="^(champion|challenger|0|[1-9][0-9]{0,8})$",
        description="champion, challenger, or a time step t",
    ),
]
FileName = Annotated[str, FromPath(max_length=200)]
_RANGE = re.compile(r"bytes=(\d{1,18})?-(\d{1,18})?")
BINARY: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The file",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    },
    206: {
        "description": "A part of the file",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    },
    304: {"description": "The client has the file (If-None-Match)"},
}


Challenger = Callable[[], Served | None]
"""What gives the candidate that is being judged."""


def router(head: Head, home: Path, challenger: Challenger = lambda: None) -> APIRouter:
    """The routes. `home` is the directory of the model's configuration and tokenizer."""
    routes = APIRouter(dependencies=[Depends(require("reader"))], tags=["models"])
    beside = {file.name: (file, _described(file)) for file in _beside(home)}

    @routes.get("/v1/models/{which}", summary="A model that can be downloaded")
    def manifest(which: Which, response: Response) -> Manifest:
        served = _found(head, which, challenger)
        response.headers.update(Model.of(served).headers())
        files = [_weights(served), *(described for _, described in beside.values())]
        return Manifest(t=served.t, sha256=served.sha256, arrival=served.arrival, seq=served.seq, files=files)

    def file(
        which: Which,
        name: FileName,
        request: Request,
        range: Annotated[str | None, Header(max_length=100)] = None,
        if_none_match: Annotated[str | None, Header(max_length=1000)] = None,
    ) -> Response:
        served = _found(head, which, challenger)
        if name == WEIGHTS_FILE:
            path, described = served.path, _weights(served)
        elif name in beside:
            path, described = beside[name]
        else:
            raise Problem("model.unknown", "the model has no such file; its manifest lists those it has")
        return sent(request, path, described, Model.of(served).headers())

    place = "/v1/models/{which}/files/{name}"
    routes.add_api_route(
        place,
        file,
        methods=["GET"],
        responses=BINARY,
        response_class=Response,
        summary="A file of a model",
    )
    routes.add_api_route(place, file, methods=["HEAD"], include_in_schema=False)
    return routes


def sent(request: Request, path: Path, described: File, headers: Mapping[str, str]) -> Response:
    """A file, or the range of it that a request asks for; nothing where the client has it. Raises Problem."""
    tag = f'"{described.sha256}"'
    headers = {**headers, "etag": tag, "cache-control": "no-cache"}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    _check_range(request, request.headers.get("range"), described.bytes)
    return FileResponse(path, headers=headers, media_type="application/octet-stream")


def _found(head: Head, which: str, challenger: Challenger) -> Served:
    """Raises Problem."""
    if which == "champion":
        found = head.current()
    elif which == "challenger":
        found = challenger()
    else:
        kept = [one for one in head.kept() if one.t == int(which)]
        found = max(kept, key=lambda one: one.seq, default=None)
    if found is None or not found.path.is_file():
        raise Problem("model.unknown")
    return found


def _weights(served: Served) -> File:
    return File(name=WEIGHTS_FILE, bytes=served.path.stat().st_size, sha256=served.sha256)


def _beside(home: Path) -> list[Path]:
    return [file for file in sorted(home.iterdir()) if file.name == CONFIG_FILE or is_tokenizer_file(file)]


def _described(file: Path) -> File:
    data = file.read_bytes()
    return File(name=file.name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _check_range(request: Request, asked: str | None, size: int) -> None:
    """Leave of the Range header what is one range of the file; others are ignored, as RFC 9110 (14.2) allows. Raises Problem (416)."""
    if asked is None:
        return
    form = _RANGE.fullmatch(asked.replace(" ", ""))
    if form is None or form.groups() == (None, None):
        _forget(request.scope, b"range")
        return
    first, last = (None if text is None else int(text) for text in form.groups())
    beyond = first >= size if first is not None else last == 0
    if beyond:
        raise Problem("range.unsatisfiable", headers={"content-range": f"bytes */{size}"})
    if first is not None and last is not None and last < first:
        _forget(request.scope, b"range")


def _forget(scope: Scope, name: bytes) -> None:
    scope["headers"][:] = [(key, value) for key, value in scope["headers"] if key.lower() != name]
