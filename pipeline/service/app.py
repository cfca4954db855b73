"""The ASGI application of a serving process.

Routers of other parts of the service are added by `create_app(setup, routers=...)`; door, errors, roles and OpenAPI cover them as well.
Invariant: importing this module starts nothing; the model is loaded, and the head followed, while the application runs.
"""

import asyncio
import contextlib
import logging
import os
import signal
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import PlainTextResponse
from starlette.types import ASGIApp

from pipeline.service import page
from pipeline.service.http import inference, label_sets, models
from pipeline.service.http.door import Door, Guard, require
from pipeline.service.http.inference import Inference
from pipeline.service.http.live import routes as live_routes
from pipeline.service.http.live.live import Live
from pipeline.service.http.problems import MEDIA_TYPE, ProblemBody, busy, install, status_name
from pipeline.service.http.schemas import Healthy, Model, Ready, Serves, Status
from pipeline.service.metrics import CONTENT_TYPE, Metrics, place
from pipeline.service.settings import Setup
from pipeline.service.tokens import Tokens
from workers.models.model import preprocess_cfg
from workers.serving.batcher import Batching
from workers.serving.decoding import Decoder, PictureLimits
from workers.serving.labels import LabelSets
from workers.serving.served import Head, HeadFile, Served
from workers.serving.serving import Observers, Serving
from workers.serving.trials import Trials

VERSION = "1"
REFUSALS = (400, 401, 403, 404, 408, 409, 412, 413, 415, 421, 422, 429, 500, 503, 507)
"""Statuses of problems that any route below /v1 may answer with."""
log = logging.getLogger("temporal_merge.service")


def create_app(
    setup: Setup,
    head: Head | None = None,
    routers: Sequence[APIRouter] = (),
    bodies: Mapping[str, int] | None = None,
    ending: threading.Event | None = None,
) -> ASGIApp:
    """The application. `head` is by default the file of the setup; `bodies` are bytes of bodies below a path, where they differ.
    `ending` is set when the process is to end.

    Raises UserError for a model directory that is none, or for a service that cannot be opened.
    """
    followed = HeadFile(setup.head) if head is None else head
    metrics, sets, limits, serving = Metrics(), LabelSets(setup.label_sets), setup.limits, setup.serving
    pictures = PictureLimits(bytes=limits.picture_bytes, pixels=limits.picture_pixels)
    live = Live.open(setup, ending or threading.Event()) if setup.out else None
    batching = Batching(serving.max_batch, serving.max_wait_ms, serving.queue)
    parts = Inference(
        Serving(setup.home, batching, sets, serving.device, _observers(metrics)),
        Decoder(preprocess_cfg(setup.home), pictures),
        sets,
        limits,
    )

    @contextlib.asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        await parts.serving.start(followed)  # before the first connection is accepted: until then they wait
        following = [asyncio.create_task(parts.serving.follow(followed))]
        if isinstance(followed, HeadFile):
            tell = partial(Trials(setup.trials).write, f"{place()}-{os.getpid()}")
            following.append(asyncio.create_task(parts.serving.follow_trials(followed.trial, tell)))
        for one in following:
            one.add_done_callback(_report)
        try:
            yield
        finally:
            for one in following:
                one.cancel()
            await parts.serving.close()
            parts.decoder.close()

    app = FastAPI(
        title=f"temporal-merge service {setup.name}", version=VERSION, lifespan=life,
        docs_url=None, redoc_url=None, redirect_slashes=False,
    )  # fmt: skip
    install(app)
    challenger = live.challenger if live else (lambda: None)
    own = (inference.router(parts), label_sets.router(parts), models.router(followed, setup.home, challenger))
    of_live = (*live_routes.routers(live), page.router(_page(setup, live))) if live else ()
    for router in (*own, *of_live, _state(setup, parts, metrics, live), *routers):
        app.include_router(router)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return Door(
        app,
        Guard(
            setup.listen,
            limits,
            Tokens(setup.tokens),
            metrics,
            {**live_routes.BODIES, **page.BODIES, **(bodies or {})},
        ),
    )


def _page(setup: Setup, live: Live) -> page.Page:
    tls = setup.listen.tls is not None or setup.listen.behind_proxy
    return page.Page(live.home, live.tokens, setup.state, secure=tls)


def _state(setup: Setup, parts: Inference, metrics: Metrics, live: Live | None) -> APIRouter:
    """Routes that say how the process is."""
    routes = APIRouter(tags=["state"])
    reads = [Depends(require("reader"))]
    probes = [] if setup.listen.probes_are_open else reads

    @routes.get("/v1/status", dependencies=reads, summary="What runs")
    async def status() -> Status:
        standing = parts.serving.standing
        serves = Serves(
            served=Model.of(standing.served) if standing.served else None,
            wanted=Model.of(standing.wanted) if standing.wanted else None,
            problem=standing.problem,
        )
        return Status(
            service=setup.name, process=place(), serving=serves, waiting=parts.serving.waiting, queue=setup.serving.queue,
            workers=setup.serving.workers, label_sets=parts.label_sets.names(),
            live=await asyncio.to_thread(live.standing) if live else None,
        )  # fmt: skip

    @routes.get("/healthz", dependencies=probes, summary="Whether the process runs")
    async def healthz() -> Healthy:
        return Healthy(ok=True)

    @routes.get("/readyz", dependencies=probes, summary="Whether a model is loaded")
    async def readyz() -> Ready:
        if parts.serving.standing.served is None:
            raise busy("model.none", 5)
        return Ready(ready=True)

    @routes.get(
        "/metrics", dependencies=probes, summary="Metrics for Prometheus", response_class=PlainTextResponse
    )
    def numbers() -> Response:
        metrics.queue.set(parts.serving.waiting)
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    return routes


def _observers(metrics: Metrics) -> Observers:
    def swapped(seconds: float, success: bool) -> None:
        metrics.swaps.labels("served" if success else "refused").observe(seconds)

    def formed(size: int, waiting: int) -> None:
        metrics.batch_size.observe(size)
        metrics.queue.set(waiting)

    def serves(served: Served) -> None:
        metrics.served_t.set(served.t)

    return Observers(swapped, formed, serves)


def _report(following: "asyncio.Task[None]") -> None:
    """A head must not raise; if it does, the process ends, so that its supervisor starts it again."""
    if not following.cancelled() and (error := following.exception()) is not None:
        log.critical("the head cannot be followed", exc_info=error)
        os.kill(os.getpid(), signal.SIGTERM)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's description, with problems in the place of its own errors, and the token."""
    if app.openapi_schema is not None:
        return app.openapi_schema
    found = get_openapi(title=app.title, version=app.version, routes=app.routes)
    parts = found.setdefault("components", {})
    schemas = parts.setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    body = ProblemBody.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas.update(body.pop("$defs", {}), ProblemBody=body)
    parts["securitySchemes"] = {
        "token": {"type": "http", "scheme": "bearer", "bearerFormat": "tmk_<id>_<secret>"}
    }
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemBody"}}}
    for path, operations in found["paths"].items():
        for operation in operations.values():
            for status in REFUSALS:
                operation["responses"][str(status)] = {"description": status_name(status), "content": content}
            if path.startswith("/v1/"):
                operation["security"] = [{"token": []}]
    app.openapi_schema = found
    return found
