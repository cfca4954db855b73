"""Requests to a service: with the token, sent again where that is safe, and refusals as errors with their code.

Invariant: a request that may have been carried out is sent again only if a second time has no further effect.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx2
from pydantic import BaseModel, ValidationError

from merge_service.errors import UserError
from pipeline.study.addresses import server_at

Shape = TypeVar("Shape", bound=BaseModel)
FIRST_WAIT, LAST_WAIT = 0.2, 10.0
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


class Connection:
    """A service at a URL, with a token. `patience` are the seconds for which a service that does not answer is tried again."""

    def __init__(self, url: str, token: str, patience: float = 60.0, timeout: float = 600.0) -> None:
        self.url, self.patience = server_at(url, "give the plain address and the token"), patience
        self._client = httpx2.Client(
            base_url=self.url, timeout=httpx2.Timeout(timeout, connect=10.0), headers={"authorization": f"Bearer {token}"}
        )  # fmt: skip

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def read(
        self, shape: type[Shape], method: str, path: str, sent: Sent = Sent(), again: bool = True
    ) -> Shape:
        """The answer as a value. Raises what `ask` does, and ServiceError `answer.unknown` for what is no answer of a service."""
        answer = self.ask(method, path, sent, again)
        try:
            return shape.model_validate_json(answer.content)
        except ValidationError:
            raise refusal(answer, f"{method} {path.partition('?')[0]}") from None

    def ask(self, method: str, path: str, sent: Sent = Sent(), again: bool = True) -> httpx2.Response:
        """The answer, of which the service says that it is one (2xx); redirects are not followed. With `again` a request whose answer was lost is sent again.

        Raises ServiceError for a refusal, and, with the code `unreachable`, where nobody answers.
        """
        until, wait = time.monotonic() + self.patience, FIRST_WAIT
        while True:
            try:
                answer = self._client.request(
                    method, path, json=sent.json, params=sent.params, content=sent.content, headers=sent.headers,
                    files=sent.files, data=sent.data,
                )  # fmt: skip
            except httpx2.TransportError as error:
                lost = not isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout)
                if time.monotonic() + wait > until or (lost and not again):
                    said = str(error) or type(error).__name__
                    raise ServiceError("unreachable", 0, f"{self.url} does not answer: {said}") from error
                time.sleep(wait)
                wait = min(2 * wait, LAST_WAIT)
                continue
            if answer.status_code < 300:
                return answer
            later = answer.headers.get("retry-after", "")
            if answer.status_code in PASSING and later.isdigit() and time.monotonic() + int(later) < until:
                time.sleep(int(later))
                continue
            raise refusal(answer, f"{method} {path.partition('?')[0]}")


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
