"""Routes of the page. They need no bearer token: a person signs in with one, and the browser sends a cookie from then on.

Invariant: no answer holds a script or leads elsewhere, and the policy in its headers forbids both. A form acts only if it carries the mac
of the session it was shown in; an operation is decided on the newest state, by `Operations`, as over HTTP and on the command line.
"""

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, cast, get_args
from urllib.parse import parse_qs

import jinja2
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import HTMLResponse, PlainTextResponse, RedirectResponse
from starlette.concurrency import run_in_threadpool

from merge_service.live import Refused, Removed, State
from pipeline.service.home import Home
from pipeline.service.http.door import PAGE
from pipeline.service.operations import Operations
from pipeline.service.page import drawing, views
from pipeline.service.page.sessions import COOKIE, SECONDS, Session, Sessions
from pipeline.service.tokens import TokenRefused, Tokens

ROOT = PAGE.rstrip("/")
KEY_FILE = "page.key"
HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "cache-control": "no-store",
    "referrer-policy": "same-origin",
    "x-frame-options": "DENY",
    "cross-origin-opener-policy": "same-origin",
}
MOST_FORM_BYTES = 16 << 10
MOST_REASON = 1000
BODIES: Mapping[str, int] = {PAGE: MOST_FORM_BYTES}
"""Bytes of a body below a path."""
Descendants = Literal["none", "keep", "remove"]
_T = re.compile("[0-9]{1,9}")
_HERE = Path(__file__).parent
refusals = logging.getLogger("temporal_merge.refused")


@dataclass(frozen=True)
class Page:
    """What the page is about. `secure`: the browser sends the cookie over TLS only."""

    home: Home
    tokens: Tokens
    state_dir: Path
    secure: bool = False

    @cached_property
    def sessions(self) -> Sessions:
        """Its sessions."""
        return Sessions(self.tokens, self.state_dir / KEY_FILE)

    @cached_property
    def templates(self) -> jinja2.Environment:
        """Templates that escape whatever they are given."""
        return jinja2.Environment(
            loader=jinja2.FileSystemLoader(_HERE / "templates"), autoescape=True,
            undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        )  # fmt: skip

    def state(self) -> State:
        """The newest state."""
        return self.home.log.refresh()

    def session(self, request: Request) -> Session | None:
        """The session of a request."""
        return self.sessions.find(request.cookies.get(COOKIE, ""))

    def show(
        self, template: str, session: Session | None, status: int = 200, **values: object
    ) -> HTMLResponse:
        """A template as an answer."""
        text = self.templates.get_template(template).render(
            root=ROOT, service=self.home.config.name, session=session,
            operator=session is not None and session.token.may("operator"), **values,
        )  # fmt: skip
        return HTMLResponse(text, status, HEADERS)

    def problem(self, session: Session | None, status: int, said: str) -> HTMLResponse:
        """A page that says why something was not done."""
        return self.show("problem.html", session, status, said=said)


def router(page: Page) -> APIRouter:
    """The routes."""
    routes = APIRouter(include_in_schema=False)

    @routes.get("/")
    def overview(request: Request, number: int = Query(1, alias="page")) -> Response:
        session = page.session(request)
        if session is None:
            return page.show("login.html", None, said="")
        state, whole = page.state(), session.token.sees_all
        return page.show(
            "overview.html",
            session,
            view=views.overview(state, number, whole),
            chart=drawing.chart(state, whole),
        )

    @routes.get(f"{ROOT}/style.css")
    def style() -> Response:
        return PlainTextResponse(
            (_HERE / "style.css").read_text(encoding="utf-8"),
            200,
            {"cache-control": "max-age=300"},
            "text/css",
        )

    @routes.get(f"{ROOT}/arrivals/{{number}}")
    def arrival(request: Request, number: str) -> Response:
        session, state = page.session(request), page.state()
        if session is None:
            return RedirectResponse("/", 303, HEADERS)
        one = state.arrivals.get(number)
        if one is None:
            return page.problem(session, 404, "There is no such arrival.")
        view = views.detail(state, page.home.config.timeline, one, session.token.sees_all)
        picture = drawing.graph(number, view.above, view.below)
        return page.show("arrival.html", session, view=view, graph=picture)

    _signing(page, routes)
    _acting(page, routes)
    return routes


def _signing(page: Page, routes: APIRouter) -> None:
    """Routes by which a session begins and ends."""

    @routes.post(f"{ROOT}/login")
    async def login(request: Request) -> Response:
        form = await _form(request)
        if not same_origin(request):
            return page.problem(None, 403, "The form came from another site.")
        try:
            cookie = await run_in_threadpool(page.sessions.begin, form.get("token", "").strip())
        except TokenRefused as refused:
            refusals.info(
                "%s on the page from %s", refused.code, request.client.host if request.client else "?"
            )
            return page.show("login.html", None, 401, said="This token opens nothing.")
        answer = RedirectResponse("/", 303, HEADERS)
        answer.set_cookie(
            COOKIE, cookie, max_age=SECONDS, path="/", secure=page.secure, httponly=True, samesite="strict"
        )
        return answer

    @routes.post(f"{ROOT}/logout")
    async def logout(request: Request) -> Response:
        answer = RedirectResponse("/", 303, HEADERS)
        answer.delete_cookie(COOKIE, path="/", secure=page.secure, httponly=True, samesite="strict")
        return answer


def _acting(page: Page, routes: APIRouter) -> None:
    """Routes of operations."""

    @routes.post(f"{ROOT}/rollback")
    async def rollback(request: Request) -> Response:
        def act(operations: Operations, form: Mapping[str, str]) -> None:
            if not _T.fullmatch(form.get("t", "")):
                raise Refused("request.invalid", "t must be a whole number")
            operations.roll_back(int(form["t"]), form["reason"], form.get("hold") == "yes")

        return await _act(page, request, act, "/")

    @routes.post(f"{ROOT}/arrivals/{{number}}/{{what}}")
    async def operate(request: Request, number: str, what: str) -> Response:
        act = _ACTS.get(what)
        if act is None:
            return page.problem(page.session(request), 404, "There is no such operation.")
        return await _act(
            page, request, lambda operations, form: act(operations, number, form), f"{ROOT}/arrivals/{number}"
        )


def same_origin(request: Request) -> bool:
    """Whether a form was sent by a page of this service, as far as the browser says where it was."""
    site = request.headers.get("sec-fetch-site", "same-origin")
    origin = request.headers.get("origin")
    return site in ("same-origin", "none") and (
        origin is None or origin.partition("://")[2] == request.headers.get("host")
    )


async def _act(
    page: Page, request: Request, act: Callable[[Operations, Mapping[str, str]], None], then: str
) -> Response:
    """Do what a form asks for, if its session may."""
    session, form = page.session(request), await _form(request)
    if session is None:
        return page.problem(None, 401, "The session has ended. Sign in again.")
    if not same_origin(request) or form.get("csrf") != session.csrf:
        refusals.info("csrf on the page from %s", request.client.host if request.client else "?")
        return page.problem(session, 403, "The form does not belong to this session. Open the page anew.")
    if not session.token.may("operator"):
        return page.problem(
            session, 403, f"This needs an operator; the token's role is {session.token.role}."
        )
    if not 0 < len(form.get("reason", "").strip()) <= MOST_REASON:
        return page.problem(session, 422, f"A reason of 1 to {MOST_REASON} characters is needed.")
    try:
        await run_in_threadpool(act, Operations(page.home, session.token.id), form)
    except Refused as refused:
        return page.problem(session, 409, str(refused))
    return RedirectResponse(then, 303, HEADERS)


async def _form(request: Request) -> dict[str, str]:
    """The fields of a form, the last of each name; nothing of a body that is too large or no form."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MOST_FORM_BYTES:
            return {}
    try:
        found = parse_qs(body.decode("utf-8"), keep_blank_values=True, max_num_fields=50)
    except ValueError:
        return {}
    return {name: values[-1] for name, values in found.items()}


def _remove(operations: Operations, number: str, form: Mapping[str, str]) -> None:
    descendants = form.get("descendants", "none")
    if descendants not in get_args(Descendants):
        raise Refused("request.invalid", "descendants must be none, keep, remove or retrain")
    data = Removed(form["reason"], form.get("force") == "yes", cast(Descendants, descendants))
    operations.remove(number, data)


def _release(operations: Operations, number: str, form: Mapping[str, str]) -> None:
    operations.release(number, form["reason"])


def _reject(operations: Operations, number: str, form: Mapping[str, str]) -> None:
    operations.reject(number, form["reason"])


def _purge(operations: Operations, number: str, form: Mapping[str, str]) -> None:
    operations.purge(number, form["reason"])


_ACTS: Mapping[str, Callable[[Operations, str, Mapping[str, str]], None]] = {
    "release": _release, "reject": _reject, "remove": _remove, "purge": _purge,
}  # fmt: skip
