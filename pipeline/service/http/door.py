"""The door of the service: what is checked of every request before a route sees it, and of every answer on its way out.

In this order: the Host header, the size that the body claims, the token. Then the body is bounded in bytes and time while it is
read, and a client that does not take its answer is cut off. Only then does a route run.
Invariant: whatever happens inside, the client gets one answer, and an error is a problem (`problems`).
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.service.http.problems import Problem, busy, log, unexpected
from pipeline.service.metrics import Metrics
from pipeline.service.settings import LimitsSection, ListenSection
from pipeline.service.tokens import Role, Token, TokenRefused, Tokens

OPEN = ("/openapi.json", "/problems/")
"""Paths that need no token: they say what is in the documentation."""
PAGE = "/page/"
"""Below this, and at /, a person signs in; the page itself looks at the session."""
PROBES = ("/healthz", "/readyz", "/metrics")
_CHALLENGE = {"www-authenticate": "Bearer"}
_CLOSE = {"connection": "close"}
_OTHER = "other"
GONE = 499
"""The status, in metrics alone, of a request whose client went away before there was an answer."""
LEFT = "tm.left"
"""In the scope of such a request, where a route noticed."""
refusals = logging.getLogger("temporal_merge.refused")
"""Who was not let in, for a file that is bounded: the log of a service must not grow by what strangers do."""


@dataclass(frozen=True)
class Guard:
    """What the door goes by. `bodies` are bytes allowed below a path, where they differ from `limits.body_bytes`."""

    listen: ListenSection
    limits: LimitsSection
    tokens: Tokens
    metrics: Metrics
    bodies: Mapping[str, int]


def require(role: Role) -> Callable[[Request], Awaitable[Token]]:
    """A dependency of FastAPI: the token of a request, whose role includes `role`. Raises Problem."""

    async def check(request: Request) -> Token:
        token: Token | None = request.scope.get("tm.token")
        if token is None:
            raise Problem("token.missing", headers=_CHALLENGE)
        if not token.may(role):
            raise Problem("role.too_low", f"this needs the role {role}; the token's is {token.role}")
        return token

    return check


class Door:
    """An ASGI application around another one."""

    def __init__(self, app: ASGIApp, guard: Guard) -> None:
        self._app, self._guard = app, guard
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As of ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, answer, held = time.monotonic(), _Answer(send, self._guard.limits.stall_s), 0
        try:
            headers = _headers(scope)
            self._check_host(scope, headers)
            most = self._most(scope["path"])
            claimed = _claimed(headers, most)
            self._identify(scope, headers)
            held = self._hold(most if claimed is None else claimed)
            body = _Body(receive, self._guard.limits, most, claimed)
            await self._app(scope, body.receive, answer.send)
        except Problem as problem:
            await answer.instead(scope, receive, problem)
        except Stalled:
            log.info("a client took no bytes of its answer for %s s", self._guard.limits.stall_s)
            raise
        except Exception as error:
            if (
                not answer.complete
            ):  # else Starlette has answered by the handler of `problems`, and raises all the same
                await answer.instead(scope, receive, unexpected(error, f"{scope['method']} {_route(scope)}"))
        finally:
            self._held -= held
            self._count(scope, answer.status, time.monotonic() - started)

    def _check_host(self, scope: Scope, headers: Mapping[bytes, list[bytes]]) -> None:
        """Refuse names that are not ours: a page in a browser may address us by a name that its owner had resolve to us."""
        named = headers.get(b"host", [])
        name = named[0].decode("latin-1").lower() if len(named) == 1 else ""
        if name.rpartition("]")[0] or ":" not in name:
            bare = name[: name.index("]") + 1] if name.startswith("[") and "]" in name else name
        else:
            bare = name.rpartition(":")[0]
        if bare not in self._guard.listen.allowed_hosts:
            refusals.info("host.unknown from %s", _client(scope))
            raise Problem("host.unknown", headers=_CLOSE)

    def _hold(self, size: int) -> int:
        """Count the bytes of a body that will be in memory. Raises Problem if there are too many together."""
        if self._held + size > self._guard.limits.held_bytes:
            raise busy("service.busy", 1, "too many bytes are on their way at once")
        self._held += size
        return size

    def _most(self, path: str) -> int:
        own = (most for prefix, most in self._guard.bodies.items() if path.startswith(prefix))
        return next(own, self._guard.limits.body_bytes)

    def _identify(self, scope: Scope, headers: Mapping[bytes, list[bytes]]) -> None:
        """Put the token into the scope. Raises Problem where one is needed and none, or none that is valid, was sent."""
        sent = headers.get(b"authorization", [])
        path: str = scope["path"]
        open_ = path == "/" or path.startswith((*OPEN, PAGE))
        open_ = open_ or (path in PROBES and self._guard.listen.probes_are_open)
        if not sent and open_:
            return
        try:
            kind, _, text = (sent[0] if len(sent) == 1 else b"").decode("latin-1").partition(" ")
            if kind.lower() != "bearer":
                raise TokenRefused("token.missing")
            scope["tm.token"] = self._guard.tokens.find(text.strip())
        except TokenRefused as refused:
            self._guard.metrics.auth_failures.labels(refused.code).inc()
            refusals.info("%s from %s", refused.code, _client(scope))
            raise Problem(refused.code, headers=_CHALLENGE) from None

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        token: Token | None = scope.get("tm.token")
        route, metrics = _route(scope), self._guard.metrics
        status = GONE if scope.get(LEFT) else status
        metrics.requests.labels(route, str(status), token.role if token else "none").inc()
        metrics.seconds.labels(route).observe(seconds)


class Stalled(Exception):
    """A client takes nothing of its answer; the connection is to be closed."""


class _Body:
    """The body of a request, as far as it is allowed."""

    def __init__(self, receive: Receive, limits: LimitsSection, most: int, claimed: int | None) -> None:
        self._receive, self._most = receive, most
        self._size, self._done = 0, claimed == 0
        expected = most if claimed is None else claimed
        self._until = time.monotonic() + limits.body_s + expected / limits.body_bytes_per_s

    async def receive(self) -> Message:
        """As of ASGI; after the body it waits, without a limit, until the client has gone. Raises Problem."""
        if self._done:
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, self._until - time.monotonic()))
        except TimeoutError:
            raise Problem("request.slow", headers=_CLOSE) from None
        self._size += len(message.get("body", b""))
        if self._size > self._most:
            raise _too_large(self._most, close=True)
        self._done = not message.get("more_body", False)
        return message


class _Answer:
    """What was sent so far. A client that takes nothing for `stall` seconds ends the request by Stalled."""

    def __init__(self, send: Send, stall: float) -> None:
        self._send, self._stall = send, stall
        self.status = GONE
        self._begun, self.complete = False, False

    async def send(self, message: Message) -> None:
        """As of ASGI."""
        if message["type"] == "http.response.start":
            self._begun, self.status = True, message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-content-type-options", b"nosniff")]
        try:
            await asyncio.wait_for(self._send(message), self._stall)
        except TimeoutError:
            raise Stalled from None
        self.complete = message["type"] == "http.response.body" and not message.get("more_body", False)

    async def instead(self, scope: Scope, receive: Receive, problem: Problem) -> None:
        """Send a problem, unless an answer has begun, which can only be broken off."""
        if self._begun:
            raise problem
        await problem.response()(scope, receive, self.send)


def _headers(scope: Scope) -> dict[bytes, list[bytes]]:
    found: dict[bytes, list[bytes]] = {}
    for name, value in scope["headers"]:
        found.setdefault(name.lower(), []).append(value)
    return found


def _claimed(headers: Mapping[bytes, list[bytes]], most: int) -> int | None:
    """Bytes of the body by its header; None where it comes in chunks. Raises Problem if they are too many."""
    said = headers.get(b"content-length")
    if said is None:
        return None if b"transfer-encoding" in headers else 0
    if not said[0].isdigit() or len(said[0]) > 18:
        raise Problem("request.malformed", "Content-Length is no number", headers=_CLOSE)
    if int(said[0]) > most:
        raise _too_large(most, close=False)
    return int(said[0])


def _too_large(most: int, close: bool) -> Problem:
    return Problem("request.too_large", f"a body has at most {most:,} bytes", headers=_CLOSE if close else {})


def _client(scope: Scope) -> str:
    client = scope.get("client")
    return str(client[0]) if client else "?"


def _route(scope: Scope) -> str:
    """The path of the route with its parameters as names: metrics must not grow by what clients send."""
    return getattr(scope.get("route"), "path", _OTHER)
