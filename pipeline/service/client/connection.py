"""Requests to a service: with the token, sent again where that is safe, and refusals as errors with their code.

Invariant: a request that may have been carried out is sent again only if a second time has no further effect.
"""

import asyncio
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

import httpx2
from pydantic import BaseModel, ValidationError

from merge_service.errors import UserError
from pipeline.study.addresses import server_at

Shape = TypeVar("Shape", bound=BaseModel)
T = TypeVar("T")
FIRST_WAIT, LAST_WAIT = 0.2, 10.0
ANSWER_SECONDS = 600.0
PASSING = frozenset({408, 409, 429, 502, 503, 504})
"""Statuses after which the same request may be answered otherwise, if Retry-After says when."""


class ServiceError(UserError):
    """What a service refused: `code` is stable, `status` that of HTTP."""

    def __init__(self, code: str, status: int, text: str) -> None:
        super().__init__(text)
        self.code, self.status = code, status

    def __reduce__(self) -> tuple[type["ServiceError"], tuple[str, int, str]]:
        return type(self), (self.code, self.status, str(self))


@dataclass(frozen=True)
class Sent:
    """What a request brings, beside its address."""

    json: object = None
    params: Mapping[str, Any] | None = None
    content: bytes | None = None
    headers: Mapping[str, str] | None = None
    files: list[tuple[str, tuple[str, bytes, str]]] | None = None
    data: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Request:
    """What is to be sent; answered by the response, or by the error that came instead."""

    method: str
    path: str
    sent: Sent


@dataclass(frozen=True)
class Pause:
    """Seconds in which nothing is to be sent."""

    seconds: float


@dataclass(frozen=True)
class Done(Generic[T]):
    """The end of an exchange."""

    value: T


Answer = httpx2.Response | httpx2.TransportError | None
Exchange = Generator[Request | Pause, Answer, T]
"""A call of a client without its waiting: what it yields is done by whoever carries it out, in a thread or in an event loop."""


@dataclass(frozen=True)
class Peer:
    """A service at `url`; one that does not answer is tried again for `patience` seconds."""

    url: str
    patience: float

    def read(
        self, shape: type[Shape], method: str, path: str, sent: Sent = Sent(), again: bool = True
    ) -> Exchange[Shape]:
        """The answer as a value. Raises what `ask` does, and ServiceError `answer.unknown` for what is no answer of a service."""
        answer = yield from self.ask(method, path, sent, again)
        try:
            return shape.model_validate_json(answer.content)
        except ValidationError:
            raise refusal(answer, f"{method} {path.partition('?')[0]}") from None

    def ask(
        self, method: str, path: str, sent: Sent = Sent(), again: bool = True
    ) -> Exchange[httpx2.Response]:
        """The answer, of which the service says that it is one (2xx); redirects are not followed. With `again` a request whose answer was lost is sent again.

        Raises ServiceError for a refusal, and, with the code `unreachable`, where nobody answers.
        """
        until, wait = time.monotonic() + self.patience, FIRST_WAIT
        while True:
            answer = yield Request(method, path, sent)
            if isinstance(answer, httpx2.TransportError):
                lost = not isinstance(answer, httpx2.ConnectError | httpx2.ConnectTimeout)
                if time.monotonic() + wait > until or (lost and not again):
                    said = str(answer) or type(answer).__name__
                    raise ServiceError("unreachable", 0, f"{self.url} does not answer: {said}") from answer
                yield Pause(wait)
                wait = min(2 * wait, LAST_WAIT)
                continue
            assert answer is not None
            if answer.status_code < 300:
                return answer
            later = answer.headers.get("retry-after", "")
            if answer.status_code in PASSING and later.isdigit() and time.monotonic() + int(later) < until:
                yield Pause(int(later))
                continue
            raise refusal(answer, f"{method} {path.partition('?')[0]}")


class Connection:
    """A service at a URL, with a token. `patience` are the seconds for which a service that does not answer is tried again."""

    def __init__(self, url: str, token: str, patience: float = 60.0) -> None:
        self.peer = _peer(url, patience)
        self._client = httpx2.Client(**_options(self.peer, token))

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def carry_out(self, exchange: Exchange[T]) -> T:
        """The result of an exchange. Raises what it raises."""
        answer: Answer = None
        while not isinstance(step := _advanced(exchange, answer), Done):
            if isinstance(step, Pause):
                time.sleep(step.seconds)
                answer = None
                continue
            try:
                answer = self._client.request(step.method, step.path, **_given(step.sent))
            except httpx2.TransportError as error:
                answer = error
        return step.value


class AsyncConnection:
    """As `Connection`, in an event loop. What an exchange reads and hashes is done in a thread."""

    def __init__(self, url: str, token: str, patience: float = 60.0) -> None:
        self.peer = _peer(url, patience)
        self._client = httpx2.AsyncClient(**_options(self.peer, token))

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def carry_out(self, exchange: Exchange[T]) -> T:
        """The result of an exchange. Raises what it raises."""
        answer: Answer = None
        while not isinstance(step := await asyncio.to_thread(_advanced, exchange, answer), Done):
            if isinstance(step, Pause):
                await asyncio.sleep(step.seconds)
                answer = None
                continue
            try:
                answer = await self._client.request(step.method, step.path, **_given(step.sent))
            except httpx2.TransportError as error:
                answer = error
        return step.value


def _peer(url: str, patience: float) -> Peer:
    return Peer(server_at(url, "give the plain address and the token"), patience)


def _options(peer: Peer, token: str) -> dict[str, Any]:
    timeout = httpx2.Timeout(ANSWER_SECONDS, connect=10.0)
    return {"base_url": peer.url, "timeout": timeout, "headers": {"authorization": f"Bearer {token}"}}


def _given(sent: Sent) -> dict[str, Any]:
    return {one.name: getattr(sent, one.name) for one in fields(sent)}


def _advanced(exchange: Exchange[T], answer: Answer) -> Request | Pause | Done[T]:
    try:
        return exchange.send(answer)
    except StopIteration as end:
        return Done(end.value)


def refusal(answer: httpx2.Response, what: str) -> ServiceError:
    """The error of an answer. What is no problem of a service comes from something before it, or is none."""
    try:
        body = answer.json()
        return ServiceError(str(body["code"]), answer.status_code, f"{body['code']}: {body['detail']}")
    except (ValueError, KeyError, TypeError):
        to = answer.headers.get("location", "")[:200]
        said = f" (a redirect to {to}, which is not followed: give the address that it leads to)" * bool(to)
        text = f"{what}: {answer.status_code}, which is no answer of a service{said}"
        return ServiceError("answer.unknown", answer.status_code, text)
